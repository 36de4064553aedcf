"""The encoder of every model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from fastbert import functional as F
from fastbert.backend import torch_private
from fastbert.backend.reference.philox import dropout
from fastbert.files import listed
from fastbert.models.config import BertConfig
from fastbert.models.inputs import Inputs, prepare
from fastbert.models.int8_files import check_state
from fastbert.models.output import Output
from fastbert.nn.base import Linear
from fastbert.nn.blocks import Embeddings, EncoderLayer, QKVProjection
from fastbert.nn.drop_in import LayerNorm
from fastbert.nn.exports import fx_leaf, refuse_script
from fastbert.nn.int8 import Int8Embedding, Int8Linear, replace_matrices
from fastbert.nn.packing import Packing
from fastbert.nn.recurrent import LSTMLayer
from fastbert.nn.watch import log_once
from fastbert.ops.context import seed_for
from fastbert.runners.frozen import Frozen


class Encoded(NamedTuple):
    """The encoder's result, with the packing and the seed that heads need."""

    x: Tensor  # (T, C), or (R, C) at the requested rows
    packing: Packing
    seed: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class Scored(NamedTuple):
    """The results of a language model's forward."""

    encoded: Encoded
    loss: Tensor | None
    logits: Tensor | None  # (B, S, V), padded
    first: Tensor  # (B, C) at the rows packing.starts, (0, C) if not requested


class Pretrained(nn.Module):
    """The base of all models: configuration, fresh weights, loading and saving, gradient checkpointing."""

    # False: transformers' Trainer divides the loss by the accumulation steps
    accepts_loss_kwargs = False
    # the class's name in checkpoints, inherited by classes that users derive
    architecture: str
    # whether `labels` has one label per token, (B, S), not one per sequence
    labels_per_token = False
    # whether the loss reads labelled rows only; `label_rows` has their numbers
    reads_label_rows = False
    # weights that the loaded file lacks, which have random values
    newly_initialised: tuple[str, ...] = ()
    bert: BertModel
    __prepare_scriptable__ = refuse_script

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # models that were pickled before these were there have none of them
        for name in ("final_norm", "head"):
            if name not in self._modules:
                self.__dict__.setdefault(name, None)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **overrides: Any) -> Any:
        """Load a Hugging Face directory; `overrides` are fields of BertConfig, such as num_labels=3."""
        from fastbert.models import checkpoint

        return checkpoint.load(cls, directory, **overrides)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """nn.Module's, with a short message for a state dict that does not fit."""
        try:
            found = super().load_state_dict(state_dict, False, assign)
        except RuntimeError as error:
            lines = str(error).splitlines()
            rest = [f"and {len(lines) - 4} more"] if len(lines) > 4 else []
            raise RuntimeError("\n".join(lines[:4] + rest)) from None
        places = {"it lacks": found.missing_keys, "the model lacks": found.unexpected_keys}
        if strict and any(places.values()):
            wrong = "; ".join(f"{why} {listed(keys, 3)}" for why, keys in places.items() if keys)
            raise RuntimeError(
                f"the state dict does not fit this {type(self).__name__}: {wrong}. Load one of the same class and "
                "configuration, or pass strict=False"
            )
        return found

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        check_state(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *args)

    def save_pretrained(self, directory: str | Path, padded: bool = False) -> None:
        """Write a directory that transformers and from_pretrained load.

        transformers has no field for sizes of single layers, which a pruned model has: from_pretrained alone loads such
        a directory. With `padded` its weights are filled up with zeros to layers of one size, for transformers to load,
        with the same outputs and without the speed.
        """
        from fastbert.models import checkpoint

        checkpoint.save(self, directory, padded)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """In training, keep only the layers' inputs and recompute each layer in backward, with the same dropout."""
        self.bert.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations, the default."""
        self.bert.gradient_checkpointing = False

    def norms_from_output(self, on: bool = True) -> None:
        """Let the layers' norms save for backward their outputs, which the next op saves anyway, and not their inputs.

        This saves two tensors (T, C) per layer. Gradients are less exact where a norm's |bias| is far above its
        |weight| (functional.dropout_add_layer_norm, from_output).
        """
        for layer in self.bert.layers:
            layer.norms_from_output = on  # type: ignore[assignment]

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        # nn.Module's call under torch.jit.trace, whose programs return tuples and no objects
        output = super()._slow_forward(*args, **kwargs)
        if isinstance(output, Output) and torch_private.traced_module() is self:
            return output.to_tuple()
        return output

    @property
    def layers_to_shard(self) -> Iterable[nn.Module]:
        """The modules that FSDP2 shards one by one: it gathers the weights of one of them at a time."""
        return self.bert.layers

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
        """Draw this class's weights as BERT does; a model with a head skips its encoder, which drew its own."""
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
        if self.bert is self and self.config.pre_norm:
            # the sum of all blocks stays as large as one block's input
            for layer in self.bert.layers:
                for m in (layer.attention.out, layer.feed_forward.down):  # type: ignore[union-attr]
                    if isinstance(m, nn.Linear):
                        m.weight.mul_((2 * len(self.bert.layers)) ** -0.5)

    def head_dropout(self, x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
        """Dropout in a head; `site` is counted on from the encoder's last site."""
        p = p if self.training else 0.0
        site += 1 + 3 * self.config.num_hidden_layers
        return dropout(x, p, seed_for(p, seed, x), site)


def _encoder_layers(c: BertConfig) -> Iterator[nn.Module]:
    for i, ((heads, width), window) in enumerate(zip(c.layer_sizes, c.windows, strict=True)):
        yield EncoderLayer(
            c.hidden_size,
            heads,
            width,
            head_size=c.head_size,
            approximate=c.approximate,
            eps=c.layer_norm_eps,
            p=c.hidden_dropout_prob,
            attention_p=c.attention_probs_dropout_prob,
            bias=bool(c.biases),
            pre_norm=bool(c.pre_norm),
            gated=bool(c.gated),
            window=window,
            # the norm of the embeddings, where there is one, stands before the first layer
            first_norm=i > 0 or c.causal,
        )


def _lstm_layers(c: BertConfig) -> Iterator[nn.Module]:
    for i in range(c.num_hidden_layers):
        # dropout is between the layers
        yield LSTMLayer(c.hidden_size, p=c.hidden_dropout_prob * (i + 1 < c.num_hidden_layers))


class BertModel(Pretrained):
    """The encoder: embeddings, layers, and the pooler (dense + tanh on the first token) where the family has one.

    An all-padding row gives zeros; with padding on the left the pooler reads the first token, not the first column.
    """

    architecture = "BertModel"

    def __init__(self, config: BertConfig, add_pooler: bool | None = None) -> None:
        super().__init__(config)
        c, width = config, config.hidden_size
        roberta, biases = c.model_type == "roberta", bool(c.biases)
        # int8 rows take the place of the table before it is read
        words = (c.pad_token_id or 0) + 1 if c.int8_embeddings else c.vocab_size
        self.embeddings = Embeddings(
            words,
            width,
            0 if c.rotary or c.recurrent else c.max_position_embeddings,
            c.type_vocab_size or 0,
            eps=c.layer_norm_eps,
            p=c.hidden_dropout_prob,
            # GPT-2's padding has an embedding like every token
            padding_idx=None if c.causal else c.pad_token_id,
            position_padding_idx=c.pad_token_id if roberta else None,
            sinusoidal=c.position_embedding_type == "sinusoidal",
            bias=biases,
            norm=not c.causal,
        )
        # an int8 model's floating-point weights take no memory at any time
        with nullcontext() if c.int8_bits is None else torch.device("meta"):
            self.layers = nn.ModuleList(_lstm_layers(c) if c.recurrent else _encoder_layers(c))
        # behind the last layer
        self.final_norm = LayerNorm(width, c.layer_norm_eps, bias=biases) if c.pre_norm else None
        wanted = c.add_pooler if add_pooler is None else add_pooler
        self.pooler = Linear(width, width) if wanted else None
        self.gradient_checkpointing = False
        # prepacked copies of the weights, which fastbert.freeze and quantize make
        self.frozen: Frozen | None = None
        if c.int8_bits is not None:
            self._empty_int8(c.int8_bits)
        self.init_weights()

    def _empty_int8(self, bits: int) -> None:
        """Put int8 modules of zeros in the place of weights that have no memory, for a checkpoint to fill."""
        c = self.config
        for layer in self.layers:
            replace_matrices(layer, lambda m: Int8Linear.like(m, bits))
            for name in ("attention_norm", "output_norm"):
                if isinstance(getattr(layer, name), nn.LayerNorm):
                    norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps, bias=bool(c.biases))
                    setattr(layer, name, norm)
        if c.int8_embeddings:
            rows = Int8Embedding(c.vocab_size, c.hidden_size, c.pad_token_id, bits)
            self.embeddings.word = rows
        self.for_inference(bits)

    def for_inference(self, bits: int) -> None:
        """Let the layers run in the native call where they can, and no weight of the encoder require a gradient."""
        self.embeddings.requires_grad_(False)
        self.layers.requires_grad_(False)
        self.frozen = Frozen(bits)

    @property
    def bert(self) -> BertModel:  # type: ignore[override]
        """The encoder: every model has this attribute, and the encoder's is itself."""
        return self

    @fx_leaf
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

        A row may occur twice. The last layer skips all other rows, unless hidden states are requested too.
        """
        packing = inputs.packing
        # one seed for the whole forward: recomputed layers must draw the same masks. None is drawn where nothing is
        # dropped: the user's next random numbers are those of a model without dropout
        seed = seed_for(self._dropout_rate(), None, inputs.ids) if self.training else None
        x = self.embeddings(inputs.ids, inputs.positions, inputs.types, seed, 0)
        unobserved = not (inputs.output_hidden_states or inputs.output_attentions)
        rotary = self._rotary(packing.max_seqlen, x.device)
        if self.frozen is not None and self.frozen.serves(self, x, unobserved):
            y = self.normed(self.frozen.encode(self, x, packing, rows, rotary))
            return Encoded(y, packing, seed, None, None)
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
                weights.append(layer.probabilities(x, packing, rotary[i]))  # type: ignore[operator]
            last = rows if i == narrow else None
            arguments = (x, packing.cu_seqlens, packing.max_seqlen, seed, 1 + 3 * i, last)
            if self.config.rotary:
                arguments = (*arguments, rotary[i])  # type: ignore[assignment]
            if self.gradient_checkpointing and self.training:
                # the seed tensor replays dropout, so the generator's state is not needed
                x = recompute(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*arguments)
        x = self.normed(x)
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

    def normed(self, x: Tensor) -> Tensor:
        """The norm behind the last layer, of hidden states (N, C); x itself where the form has none."""
        return x if self.final_norm is None else self.final_norm(x)

    def _rotary(self, length: int, device: torch.device) -> list[F.Rotary | None]:
        """The angles of every layer's rotary positions, for sequences of at most `length` tokens."""
        c = self.config
        if not c.rotary:
            return [None] * len(self.layers)
        thetas = [c.rope_theta if w is None else c.local_rope_theta for w in c.windows]
        tables = {t: F.Rotary.of(length, c.head_size, t, device=device) for t in set(thetas)}
        return [tables[t] for t in thetas]

    def _dropout_rate(self) -> float:
        """The greatest probability of dropout in the embeddings and layers."""
        rates = [self.embeddings.p]
        for layer in self.layers:
            # a layer that the user put there may have other attributes
            attention = getattr(layer, "attention", None)
            rates += [getattr(layer, "p", 0.0), getattr(attention, "p", 0.0)]
        return max(rates)

    def encode_starts(self, inputs: Inputs) -> Encoded:
        """Run the encoder for every sequence's first token: x is (B, C), zeros for an empty sequence."""
        e = self.encode(inputs, inputs.packing.starts(inputs.positions.shape[0]))
        return e._replace(x=e.packing.of_starts(e.x))

    def encode_ends(self, inputs: Inputs) -> Encoded:
        """Run the encoder for every sequence's last token: x is (B, C), zeros for an empty sequence."""
        e = self.encode(inputs, inputs.packing.ends(inputs.positions.shape[0]))
        return e._replace(x=e.packing.of_starts(e.x))

    def pool(self, first: Tensor) -> Tensor:
        """Dense + tanh on every sequence's first token (B, C)."""
        return torch.tanh(self.pooler(first))  # type: ignore[misc]
