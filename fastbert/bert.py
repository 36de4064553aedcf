"""BERT, RoBERTa and DistilBERT with their heads; a family is an argument of BertConfig, not a class.

Tokens are packed inside: a padded batch is unpadded once before the embeddings (one host sync) and padded again only
for the outputs, with zeros at padding. A caller with packed tokens passes input_ids (T,), cu_seqlens (B + 1,) int32
and max_seqlen, needs no sync, and gets packed outputs. Arguments and outputs are named as in transformers; every
forward also takes output_hidden_states, output_attentions, cu_seqlens and max_seqlen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as stock
from torch.utils.checkpoint import checkpoint as recompute

from fastbert import functional as F
from fastbert.blocks import (
    Embeddings,
    EncoderLayer,
    Linear,
    MLMHead,
    NSPHead,
    QKVProjection,
    log_once,
)
from fastbert.config import BertConfig
from fastbert.freeze import Frozen
from fastbert.ops._register import seed_for
from fastbert.packing import Inputs, Packing, prepare
from fastbert.reference.philox import dropout

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "Output",
]

# --- results ---


@dataclass
class Output:
    """A model's results; fields that were not computed are None, and are left out of indices and iteration.

    Per-token fields are (B, S, ...) with zeros at padding, or (T, ...) where the caller passed packed tokens;
    attentions are always (B, H, S, S).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    prediction_logits: Tensor | None = None  # (B, S, V)
    seq_relationship_logits: Tensor | None = None  # (B, 2)
    start_logits: Tensor | None = None  # (B, S)
    end_logits: Tensor | None = None  # (B, S)
    last_hidden_state: Tensor | None = None  # (B, S, C)
    pooler_output: Tensor | None = None  # (B, C)
    # the embeddings, then every layer's output
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    mlm_loss: Tensor | None = None
    nsp_loss: Tensor | None = None

    def keys(self) -> list[str]:
        """The names of the fields that were computed."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """The computed fields in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{key!r} was not computed: there are {', '.join(self.keys())}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())


# --- the encoder ---


class Encoded(NamedTuple):
    """The encoder's result and what the heads need with it."""

    x: Tensor  # (T, C), or (R, C) at the rows that were asked for
    packing: Packing
    seed: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class Pretrained(nn.Module):
    """What all models share: the configuration, fresh weights, directories, gradient checkpointing."""

    # transformers' Trainer then divides the loss by the accumulation steps itself
    accepts_loss_kwargs = False
    bert: BertModel

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls, directory: str | Path, **overrides: Any) -> Any:
        """Load a Hugging Face directory; `overrides` are fields of BertConfig, such as num_labels=3."""
        from fastbert import checkpoint

        return checkpoint.load(cls, directory, **overrides)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that transformers and from_pretrained load."""
        from fastbert import checkpoint

        checkpoint.save(self, directory)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Keep only the layers' inputs in training and compute each layer again in backward, with the same dropout."""
        self.bert.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations, the default."""
        self.bert.gradient_checkpointing = False

    def norms_from_output(self, on: bool = True) -> None:
        """Have the layers' norms keep for backward their outputs, which are kept anyway, and not their inputs.

        It saves two rows (T, C) a layer; gradients are less exact where a norm's |bias| is far above its |weight|
        (functional.dropout_add_layer_norm, from_output).
        """
        for layer in self.bert.layers:
            layer.norms_from_output = on  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights of this class as BERT does; a head leaves its encoder alone, which has drawn its own."""
        inside = set(self.bert.modules()) if self.bert is not self else set()
        for module in self.modules():
            if module in inside:
                continue
            if isinstance(module, (nn.Linear, nn.Embedding, QKVProjection)):
                module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, (nn.Linear, QKVProjection)) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        if self.bert is self and self.bert.embeddings.sinusoidal:
            self.bert.embeddings.fill_positions()

    def head_dropout(self, x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
        """Dropout in a head; `site` counts from the last one of the encoder."""
        site += 1 + 3 * self.config.num_hidden_layers
        return dropout(x, p if self.training else 0.0, seed, site)


class BertModel(Pretrained):
    """The encoder: embeddings, layers, and the pooler (dense + tanh on the first token) where the family has one.

    An all-padding row gives zeros; with padding on the left the pooler reads the first token, not the first column.
    """

    def __init__(self, config: BertConfig, add_pooler: bool | None = None) -> None:
        super().__init__(config)
        c, width = config, config.hidden_size
        roberta = c.model_type == "roberta"
        self.embeddings = Embeddings(
            c.vocab_size,
            width,
            c.max_position_embeddings,
            c.type_vocab_size or 0,
            eps=c.layer_norm_eps,
            p=c.hidden_dropout_prob,
            padding_idx=c.pad_token_id,
            position_padding_idx=c.pad_token_id if roberta else None,
            sinusoidal=c.position_embedding_type == "sinusoidal",
        )
        self.layers = nn.ModuleList(
            EncoderLayer(
                width,
                c.num_attention_heads,
                c.intermediate_size,
                approximate=c.approximate,
                eps=c.layer_norm_eps,
                p=c.hidden_dropout_prob,
                attention_p=c.attention_probs_dropout_prob,
            )
            for _ in range(c.num_hidden_layers)
        )
        wanted = c.add_pooler if add_pooler is None else add_pooler
        self.pooler = Linear(width, width) if wanted else None
        self.gradient_checkpointing = False
        # packed copies of the weights, by fastbert.freeze only
        self.frozen: Frozen | None = None
        self.init_weights()

    @property
    def bert(self) -> BertModel:  # type: ignore[override]
        """The encoder of every model, here itself."""
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, S) int64, or packed (T,)
        attention_mask: Tensor | None = None,  # (B, S), 1 at tokens
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # (B, S, C), or packed (T, C), instead of input_ids
        **options: Any,
    ) -> Output:
        """Encode a batch; `options` are cu_seqlens, max_seqlen, output_hidden_states, output_attentions."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        e = self.encode(prepare(self.config, *batch, **options))
        return Output(
            last_hidden_state=e.packing.pad(e.x),
            pooler_output=None if self.pooler is None else self.pool(e.packing.first(e.x)),
            hidden_states=e.hidden_states,
            attentions=e.attentions,
        )

    def encode(self, inputs: Inputs, rows: Tensor | None = None) -> Encoded:
        """Run the encoder on a packed batch; with `rows` (R,) the result is at these rows, in this order.

        A row may be asked for twice. The last layer leaves out the others, unless the hidden states are wanted too.
        """
        packing = inputs.packing
        # one seed for the whole forward, whatever the modules' p: recomputed layers must see the same masks
        seed = seed_for(1.0, None, inputs.ids) if self.training else None
        x = self.embeddings(inputs.ids, inputs.positions, inputs.types, seed, 0)
        whole = not (inputs.output_hidden_states or inputs.output_attentions)
        if self.frozen is not None and whole and self.frozen.serves(self, x):
            return Encoded(self.frozen.encode(self, x, packing, rows), packing, seed, None, None)
        states: list[Tensor] = []
        weights: list[Tensor] = []
        narrow = -1 if inputs.output_hidden_states else len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if inputs.output_hidden_states:
                states.append(packing.pad(x))
            if inputs.output_attentions:
                log_once(
                    "output_attentions computes the attention weights a second time, in plain torch"
                )
                weights.append(layer.attention.probabilities(x, packing))  # type: ignore[operator, union-attr]
            last = rows if i == narrow else None
            arguments = (x, packing.cu_seqlens, packing.max_seqlen, seed, 1 + 3 * i, last)
            if self.gradient_checkpointing and self.training:
                # dropout is replayed from the seed tensor, so that the generator's state is not needed
                x = recompute(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*arguments)
        if inputs.output_hidden_states:
            states.append(packing.pad(x))
        if rows is not None and narrow < 0:
            x = x.index_select(0, rows)
        return Encoded(
            x,
            packing,
            seed,
            tuple(states) if inputs.output_hidden_states else None,
            tuple(weights) if inputs.output_attentions else None,
        )

    def encode_starts(self, inputs: Inputs) -> Encoded:
        """Run the encoder for every sequence's first token: x is (B, C), zeros where a sequence has none."""
        e = self.encode(inputs, inputs.packing.starts(inputs.positions.shape[0]))
        return e._replace(x=e.packing.of_starts(e.x))

    def pool(self, first: Tensor) -> Tensor:
        """Dense + tanh on every sequence's first token (B, C)."""
        return torch.tanh(self.pooler(first))  # type: ignore[misc]


# --- heads ---


def class_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Cross-entropies of logits (N, classes) at labels (N,) but -100: their sum, divided by their number or `count`.

    0 where none is left.
    """
    labels = labels.reshape(-1)
    total = F.cross_entropy(logits, labels, reduction="sum")
    return total / ((labels != -100).sum().clamp(min=1) if count is None else count)


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """A sequence classifier's loss, of the kind that transformers takes from problem_type, or tells from the labels."""
    classes = logits.shape[-1]
    if problem_type is None:
        kinds = "multi_label_classification", "single_label_classification"
        integers = labels.dtype in (torch.int64, torch.int32)
        problem_type = "regression" if classes == 1 else kinds[integers]
    if problem_type == "single_label_classification":
        return class_loss(logits, labels)
    if classes == 1:
        logits, labels = logits.reshape(-1), labels.reshape(-1)
    if logits.shape != labels.shape or not labels.is_floating_point():
        raise ValueError(
            f"{problem_type} takes floating-point labels of shape {tuple(logits.shape)}, "
            f"not {tuple(labels.shape)} {labels.dtype}"
        )
    if problem_type == "regression":
        return stock.mse_loss(logits, labels)
    return stock.binary_cross_entropy_with_logits(logits, labels)


def position_loss(scores: Tensor, position: Tensor, packing: Packing) -> Tensor:
    """Cross-entropy of scores (T,) over each sequence's tokens; a position (B,) outside of them is ignored."""
    grid = packing.spread(scores)  # (B, S)
    token = packing.spread(torch.ones_like(scores, dtype=torch.bool))
    length = grid.shape[1]
    position = position.reshape(-1)
    inside = (position >= 0) & (position < length)
    position = position.clamp(0, length - 1)
    inside = inside & token.gather(1, position[:, None]).squeeze(1)
    grid = grid.masked_fill(~token, torch.finfo(grid.dtype).min)
    return class_loss(grid, torch.where(inside, position, -100))


class _Head(Pretrained):
    """An encoder with something on top."""

    def __init__(self, config: BertConfig, add_pooler: bool = False) -> None:
        super().__init__(config)
        if add_pooler and config.model_type == "distilbert":
            raise ValueError(f"{type(self).__name__} needs the pooler, which DistilBERT has not")
        self.bert = BertModel(config, add_pooler)


class Scored(NamedTuple):
    """What a masked-LM model has computed."""

    encoded: Encoded
    loss: Tensor | None
    logits: Tensor | None  # (B, S, V), padded
    first: Tensor  # (B, C) at the rows packing.starts, (0, C) where they were not asked for


class _MaskedLM(_Head):
    def __init__(self, config: BertConfig, add_pooler: bool = False) -> None:
        super().__init__(config, add_pooler)
        self.mlm_head = MLMHead(
            config.hidden_size,
            config.vocab_size,
            # RoBERTa's head has the exact GELU whatever hidden_act says
            approximate="none" if config.model_type == "roberta" else config.approximate,
            eps=config.layer_norm_eps,
            tied=config.tie_word_embeddings,
        )

    def _masked_lm(
        self,
        inputs: Inputs,
        return_logits: bool | None,
        items: Tensor | int | None,
        starts: bool = False,
    ) -> Scored:
        """Run the encoder for the rows that the loss, the logits and, with `starts`, the pooler need; score them."""
        labels, rows = inputs.labels, inputs.label_rows
        if labels is None or rows is None:
            labels, rows = None, inputs.positions[:0]
        if return_logits is None:
            return_logits = labels is None or not self.training
        labelled = rows.shape[0]
        if starts:
            # a first token that is labelled too is computed twice, which costs less than to find it
            rows = torch.cat([rows, inputs.packing.starts(inputs.positions.shape[0])])
        e = self.bert.encode(inputs, None if return_logits else rows)
        x = e.x.index_select(0, rows) if return_logits else e.x
        word = self.bert.embeddings.word.weight
        loss = logits = None
        if labels is not None:
            reduction = "mean" if items is None else "sum"
            labels = labels.index_select(0, rows[:labelled])
            loss = self.mlm_head.loss(x[:labelled], labels, word, reduction)
            loss = loss if items is None else loss / items
        if return_logits:
            logits = e.packing.pad(self.mlm_head(e.x, word))
        return Scored(e, loss, logits, x[labelled:])


class BertForPreTraining(_MaskedLM):
    """Masked-LM and next-sentence heads; the loss is the sum of the two, or the one whose labels are given."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooler=True)
        self.nsp_head = NSPHead(config.hidden_size)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B, S) or (T,), -100 = not labelled
        next_sentence_label: Tensor | None = None,  # (B,), 0 = is next, 1 = random
        return_logits: bool | None = None,
        label_rows: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_pairs_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> Output:
        """Score tokens and sentence pairs; arguments as in BertForMaskedLM.

        The next-sentence loss is the mean over pairs, or their sum / num_pairs_in_batch.
        """
        inputs = prepare(
            self.config,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            labels=labels,
            label_rows=label_rows,
            rows_wanted=True,
            **options,
        )
        e, mlm_loss, logits, first = self._masked_lm(
            inputs, return_logits, num_items_in_batch, starts=True
        )
        nsp_logits = self.nsp_head(self.bert.pool(e.packing.of_starts(first)))
        nsp_loss = None
        if next_sentence_label is not None:
            nsp_loss = class_loss(nsp_logits, next_sentence_label, num_pairs_in_batch)
        losses = [loss for loss in (mlm_loss, nsp_loss) if loss is not None]
        return Output(
            loss=sum(losses[1:], losses[0]) if losses else None,
            prediction_logits=logits,
            seq_relationship_logits=nsp_logits,
            hidden_states=e.hidden_states,
            attentions=e.attentions,
            mlm_loss=mlm_loss,
            nsp_loss=nsp_loss,
        )


class BertForMaskedLM(_MaskedLM):
    """The masked-LM head alone."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B, S) or (T,), -100 = not labelled
        return_logits: bool | None = None,
        label_rows: Tensor | None = None,  # (R,) int64
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> Output:
        """Score every token; with labels in training only labelled rows, unless return_logits is True.

        `label_rows` are the packed row numbers of the labelled tokens and save a host sync; the loss is the mean over
        labelled tokens, or their sum / num_items_in_batch.
        """
        inputs = prepare(
            self.config,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            labels=labels,
            label_rows=label_rows,
            rows_wanted=True,
            **options,
        )
        e, loss, logits, _ = self._masked_lm(inputs, return_logits, num_items_in_batch)
        return Output(
            loss=loss, logits=logits, hidden_states=e.hidden_states, attentions=e.attentions
        )


class BertForNextSentencePrediction(_Head):
    """The next-sentence head alone; logits (B, 2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooler=True)
        self.nsp_head = NSPHead(config.hidden_size)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B,), 0 = is next, 1 = random
        **options: Any,
    ) -> Output:
        """Score sentence pairs."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        e = self.bert.encode_starts(prepare(self.config, *batch, **options))
        logits = self.nsp_head(self.bert.pool(e.x))
        loss = None if labels is None else class_loss(logits, labels)
        return Output(
            loss=loss, logits=logits, hidden_states=e.hidden_states, attentions=e.attentions
        )


class BertForSequenceClassification(_Head):
    """A classifier of whole sequences; logits (B, num_labels).

    BERT classifies the pooler's output; RoBERTa and DistilBERT have a dense layer of their own, tanh and ReLU.
    """

    def __init__(self, config: BertConfig) -> None:
        pooler = config.model_type == "bert"
        super().__init__(config, add_pooler=pooler)
        width = config.hidden_size
        self.pre_classifier = None if pooler else Linear(width, width)
        self.classifier = Linear(width, config.num_labels or 1)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B,) classes or values, or (B, num_labels) floating point
        **options: Any,
    ) -> Output:
        """Score sequences; problem_type names the loss, as in transformers."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        e = self.bert.encode_starts(prepare(self.config, *batch, **options))
        logits = self.classifier(self._features(e))
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.problem_type)
        return Output(
            loss=loss, logits=logits, hidden_states=e.hidden_states, attentions=e.attentions
        )

    def _features(self, e: Encoded) -> Tensor:
        """(B, C): what the classifier sees."""
        p = self.config.classifier_p
        if self.pre_classifier is None:
            return self.head_dropout(self.bert.pool(e.x), p, e.seed, 0)
        x = e.x
        if self.config.model_type == "distilbert":
            x = torch.relu(self.pre_classifier(x))
            return self.head_dropout(x, self.config.seq_classif_dropout, e.seed, 0)
        x = torch.tanh(self.pre_classifier(self.head_dropout(x, p, e.seed, 0)))
        return self.head_dropout(x, p, e.seed, 1)


class BertForTokenClassification(_Head):
    """A classifier of every token; logits (B, S, num_labels)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.classifier = Linear(config.hidden_size, config.num_labels or 1)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B, S) or (T,), -100 = not labelled
        **options: Any,
    ) -> Output:
        """Score tokens; labels at padding do not count."""
        inputs = prepare(
            self.config,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            labels=labels,
            **options,
        )
        e = self.bert.encode(inputs)
        logits = self.classifier(self.head_dropout(e.x, self.config.classifier_p, e.seed, 0))
        return Output(
            loss=None if inputs.labels is None else class_loss(logits, inputs.labels),
            logits=e.packing.pad(logits),
            hidden_states=e.hidden_states,
            attentions=e.attentions,
        )


class BertForQuestionAnswering(_Head):
    """Start and end scores of an answer, (B, S) each."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.classifier = Linear(config.hidden_size, 2)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,  # (B,), columns, or offsets where packed
        end_positions: Tensor | None = None,
        **options: Any,
    ) -> Output:
        """Score spans; the softmax of the loss runs over tokens only, and positions outside of them do not count."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        e = self.bert.encode(prepare(self.config, *batch, **options))
        p = self.config.qa_dropout if self.config.model_type == "distilbert" else 0.0
        scores = self.classifier(self.head_dropout(e.x, p, e.seed, 0))  # (T, 2)
        start, end = scores[:, 0], scores[:, 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            first = position_loss(start, start_positions, e.packing)
            loss = (first + position_loss(end, end_positions, e.packing)) / 2
        return Output(
            loss=loss,
            start_logits=e.packing.pad(start),
            end_logits=e.packing.pad(end),
            hidden_states=e.hidden_states,
            attentions=e.attentions,
        )
