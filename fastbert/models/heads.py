"""Models with heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.models.config import BertConfig
from fastbert.models.encoder import BertModel, Encoded, Pretrained, Scored
from fastbert.models.inputs import Inputs, prepare
from fastbert.models.losses import class_loss, position_loss, sequence_loss
from fastbert.models.output import Output, SequenceOutput
from fastbert.nn.base import Linear
from fastbert.nn.blocks import HeadTransform, MLMHead, NSPHead
from fastbert.nn.exports import fx_leaf
from fastbert.nn.int8 import Int8Embedding
from fastbert.nn.tied import tied


class _Head(Pretrained):
    """An encoder with a head."""

    # whether the class is for a GPT alone, or, with None, for every family
    causal: bool | None = False

    def __init__(self, config: BertConfig, add_pooler: bool = False) -> None:
        super().__init__(config)
        name = type(self).__name__
        if self.causal not in (None, config.causal):
            remedy = "it takes gpt2 alone"
            if config.causal:
                remedy = "load a gpt2 with GPTForCausalLM, or for classes of texts or of tokens"
            raise ValueError(f"model_type is {config.model_type} and the model {name}: {remedy}")
        if add_pooler and config.model_type == "distilbert":
            raise ValueError(f"{name} needs the pooler, which DistilBERT does not have")
        if add_pooler and config.model_type == "modernbert" and not config.add_pooler:
            raise ValueError(
                f"{name} needs the pooler, which ModernBERT does not have: set add_pooler to true"
            )
        self.bert = BertModel(config, add_pooler)

    def _transform(self) -> HeadTransform | None:
        """What a classifier's input passes through before it, in ModernBERT."""
        c = self.config
        if c.model_type != "modernbert":
            return None
        return HeadTransform(c.hidden_size, eps=c.layer_norm_eps, bias=bool(c.biases))


class LanguageModel(_Head):
    """A model that scores the words of the vocabulary."""

    labels_per_token = True
    reads_label_rows = True

    def __init__(self, config: BertConfig, add_pooler: bool = False) -> None:
        super().__init__(config, add_pooler)
        self.mlm_head = self._language_head(config)

    def _language_head(self, config: BertConfig) -> MLMHead:
        return MLMHead(
            config.hidden_size,
            config.vocab_size,
            # these heads have the exact GELU for every hidden_act
            approximate="none"
            if config.model_type in ("roberta", "modernbert")
            else config.approximate,
            eps=config.layer_norm_eps,
            tied=config.tie_word_embeddings,
            bias=bool(config.biases),
        )

    def _scored(
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
            # a first token that is also labelled is computed twice, which costs less than a search for duplicates
            rows = torch.cat([rows, inputs.packing.starts(inputs.positions.shape[0])])
        table = self.bert.embeddings.word
        word = table if isinstance(table, Int8Embedding) else table.weight
        # without a loss the decoder gets no gradient
        scored = labels is not None and self.mlm_head.decoder is None
        if scored and (pair := tied(table, inputs.ids)) is not None:
            word, embedded = pair
            inputs = inputs._replace(ids=embedded)
        e = self.bert.encode(inputs, None if return_logits else rows)
        x = e.x.index_select(0, rows) if return_logits else e.x
        loss = logits = None
        if labels is not None:
            reduction = "mean" if items is None else "sum"
            labels = labels.index_select(0, rows[:labelled])
            loss = self.mlm_head.loss(x[:labelled], labels, word, reduction)
            loss = loss if items is None else loss / items
        if return_logits:
            logits = e.packing.pad(self.mlm_head(e.x, word))
        return Scored(e, loss, logits, x[labelled:])


class BertForPreTraining(LanguageModel):
    """Masked-LM and next-sentence heads; the loss is the sum of the losses whose labels are given."""

    architecture = "BertForPreTraining"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooler=True)
        self.nsp_head = NSPHead(config.hidden_size)
        self.init_weights()

    @fx_leaf
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
        e, mlm_loss, logits, first = self._scored(
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


class BertForMaskedLM(LanguageModel):
    """The masked-LM head alone."""

    architecture = "BertForMaskedLM"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.init_weights()

    @fx_leaf
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
        e, loss, logits, _ = self._scored(inputs, return_logits, num_items_in_batch)
        return Output(
            loss=loss, logits=logits, hidden_states=e.hidden_states, attentions=e.attentions
        )


class BertForNextSentencePrediction(_Head):
    """The next-sentence head alone; logits (B, 2)."""

    architecture = "BertForNextSentencePrediction"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooler=True)
        self.nsp_head = NSPHead(config.hidden_size)
        self.init_weights()

    @fx_leaf
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B,), 0 = is next, 1 = random
        **options: Any,
    ) -> SequenceOutput:
        """Score sentence pairs."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        e = self.bert.encode_starts(prepare(self.config, *batch, **options))
        logits = self.nsp_head(self.bert.pool(e.x))
        loss = None if labels is None else class_loss(logits, labels)
        return SequenceOutput(
            loss=loss, logits=logits, hidden_states=e.hidden_states, attentions=e.attentions
        )


class BertForSequenceClassification(_Head):
    """A classifier of whole sequences; logits (B, num_labels).

    BERT classifies the pooler's output; RoBERTa has a dense layer with tanh instead, DistilBERT one with ReLU.
    ModernBERT classifies what a HeadTransform makes of the first token, or of the mean of all tokens where config.json
    has the classifier_pooling "mean". An LSTM classifies the mean of all tokens, or the first one where config.json has
    "cls", as RoBERTa does the first. A GPT classifies the last token without a bias, as transformers'
    GPT2ForSequenceClassification does.
    """

    architecture = "BertForSequenceClassification"
    causal = None

    def __init__(self, config: BertConfig) -> None:
        pooler = config.model_type == "bert"
        super().__init__(config, add_pooler=pooler)
        width = config.hidden_size
        self.head = self._transform()
        plain = pooler or self.head is not None or config.causal
        self.pre_classifier = None if plain else Linear(width, width)
        self.classifier = Linear(width, config.num_labels or 1, bias=not config.causal)
        self.init_weights()

    @fx_leaf
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B,) classes or values, or (B, num_labels) floating point
        **options: Any,
    ) -> SequenceOutput:
        """Score sequences; problem_type names the loss, as in transformers."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        inputs = prepare(self.config, *batch, **options)
        if self.config.classifier_pooling == "mean":
            e = self.bert.encode(inputs)
            e = e._replace(x=e.packing.mean(e.x))
        elif self.config.classifier_pooling == "last":
            e = self.bert.encode_ends(inputs)
        else:
            e = self.bert.encode_starts(inputs)
        logits = self.classifier(self._features(e))
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.problem_type)
        return SequenceOutput(
            loss=loss, logits=logits, hidden_states=e.hidden_states, attentions=e.attentions
        )

    def _features(self, e: Encoded) -> Tensor:
        """(B, C): the classifier's input."""
        p = self.config.classifier_p
        if self.head is not None:
            return self.head_dropout(self.head.transform(e.x), p, e.seed, 0)
        if self.config.causal:
            return e.x
        if self.pre_classifier is None:
            return self.head_dropout(self.bert.pool(e.x), p, e.seed, 0)
        x = e.x
        if self.config.model_type == "distilbert":
            x = torch.relu(self.pre_classifier(x))
            return self.head_dropout(x, self.config.seq_classif_dropout, e.seed, 0)
        x = torch.tanh(self.pre_classifier(self.head_dropout(x, p, e.seed, 0)))
        return self.head_dropout(x, p, e.seed, 1)


class BertForTokenClassification(_Head):
    """A classifier of every token; logits (B, S, num_labels). A GPT's tokens do not see those behind them."""

    architecture = "BertForTokenClassification"
    causal = None
    labels_per_token = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.head = self._transform()
        self.classifier = Linear(config.hidden_size, config.num_labels or 1)
        self.init_weights()

    @fx_leaf
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
        batch = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        inputs = prepare(self.config, *batch, labels=labels, **options)
        e = self.bert.encode(inputs)
        x = e.x if self.head is None else self.head.transform(e.x)
        logits = self.classifier(self.head_dropout(x, self.config.classifier_p, e.seed, 0))
        return Output(
            loss=None if inputs.labels is None else class_loss(logits, inputs.labels),
            logits=e.packing.pad(logits),
            hidden_states=e.hidden_states,
            attentions=e.attentions,
        )


class BertForQuestionAnswering(_Head):
    """Start and end scores of an answer, (B, S) each."""

    architecture = "BertForQuestionAnswering"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.head = self._transform()
        self.classifier = Linear(config.hidden_size, 2)
        self.init_weights()

    @fx_leaf
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
        """Score spans; the loss's softmax runs over tokens only, and positions without a token do not count."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        e = self.bert.encode(prepare(self.config, *batch, **options))
        c = self.config
        p = {"distilbert": c.qa_dropout, "modernbert": c.classifier_p}.get(c.model_type, 0.0)
        x = e.x if self.head is None else self.head.transform(e.x)
        scores = self.classifier(self.head_dropout(x, p, e.seed, 0))  # (T, 2)
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
