"""BERT's own building blocks, on packed tokens (T, C); fastbert.nn exports them and models/ is made of them.

Dropout draws its bits from `seed` (int64, one element) at the absolute site numbers given; without a seed every op
draws its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.backend.reference.philox import dropout
from fastbert.nn.attention_maps import attention_maps
from fastbert.nn.base import Block, Linear, bias_alone, sinusoidal_positions, without_gradients
from fastbert.nn.feed_forward import FeedForward, GatedFeedForward
from fastbert.nn.int8 import Int8Embedding
from fastbert.nn.layer import (
    LayerCall,
    LayerSettings,
    LayerWeights,
    Observer,
    Rates,
    activation_name,
    attention_block,
    encoder_layer,
)
from fastbert.nn.packing import Packing
from fastbert.nn.watch import first_hooked
from fastbert.ops.context import seed_for


class Embeddings(Block):
    """Word + position + type embeddings, LayerNorm, dropout; no positions, types or norm where the arguments say so."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_positions: int,
        types: int = 2,
        *,
        eps: float = 1e-12,
        p: float = 0.1,
        padding_idx: int | None = 0,
        position_padding_idx: int | None = None,
        sinusoidal: bool = False,
        bias: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.word: nn.Embedding | Int8Embedding
        self.word = nn.Embedding(vocab_size, hidden_size, padding_idx)
        self.position: nn.Embedding | None = None
        if max_positions:
            self.position = nn.Embedding(max_positions, hidden_size, position_padding_idx)
        self.token_type = nn.Embedding(types, hidden_size) if types else None
        self.norm = nn.LayerNorm(hidden_size, eps, bias=bias) if norm else None
        self.p = p
        self.sinusoidal = sinusoidal
        if sinusoidal:
            self.fill_positions()

    def fill_positions(self) -> None:
        """Write the fixed position table, which is not trained."""
        assert self.position is not None
        table = sinusoidal_positions(*self.position.weight.shape)
        self.position.weight.requires_grad_(False).copy_(table)

    def forward(
        self,
        ids: Tensor,  # (T,) int64, or ready word embeddings (T, C)
        positions: Tensor,  # (T,) int64
        types: Tensor | None = None,  # (T,) int64; None: type 0
        seed: Tensor | None = None,
        site: int = 0,
    ) -> Tensor:
        p = self.p if self.training else 0.0
        if self.token_type is None:
            types = None
        elif types is None:
            types = torch.zeros_like(positions)
        if self.position is None or self.norm is None:
            return self._in_steps(ids, positions, types, p, seed, site)
        if isinstance(self.word, Int8Embedding) and not ids.is_floating_point():
            ids = self.word(ids).to(self.position.weight.dtype)
        return F.embed(
            ids,
            positions,
            types,
            None if ids.is_floating_point() else self.word.weight,
            self.position.weight,
            None if self.token_type is None else self.token_type.weight,
            self.norm.weight,
            torch.zeros_like(self.norm.weight) if self.norm.bias is None else self.norm.bias,
            eps=self.norm.eps,
            p=p,
            seed=seed,
            site=site,
            padding_idx=self.word.padding_idx,
            position_padding_idx=self.position.padding_idx,
        )

    def _in_steps(self, ids: Tensor, positions: Tensor, types: Any, p: float, *drop: Any) -> Tensor:
        beside: Any = self.norm or self.position
        x = ids if ids.is_floating_point() else self.word(ids).to(beside.weight.dtype)
        if self.position is not None:
            x = x + self.position(positions)
        if self.token_type is not None:
            x = x + self.token_type(types)
        if self.norm is not None:
            x = F.layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        seed, site = drop
        return x if p == 0.0 else dropout(x, p, seed_for(p, seed, x), site)


class QKVProjection(Block):
    """Queries, keys and values by one fused weight (3 H D, C) whose rows are q, k, v: (T, C) -> (T, 3, H, D).

    D is `head_size`, None: C / H.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, head_size: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        if head_size is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}"
                )
            head_size = hidden_size // num_heads
        self.num_heads = num_heads
        rows = 3 * num_heads * head_size
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        # a weight without memory has nothing to draw, and torch would import its Python operators: 6 s and 150 MB
        if not self.weight.is_meta and rows:
            nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # (T, C) -> (T, 3, H, D)
        biases = None if self.bias is None else [self.bias]
        return F.qkv_proj(x, [self.weight], biases, self.num_heads)


class SelfAttention(Block):
    """Multi-head self-attention inside each sequence, with the output projection: (T, C) -> (T, C), or (R, C).

    With `window` a token sees so many tokens before and behind itself. Without heads it is the projection's bias.
    """

    # on the class, since models that were pickled before lack them; an observer is set for the time of a forward
    window: tuple[int, int] | None = None
    observer: Observer | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        p: float = 0.1,
        head_size: int | None = None,  # D; None: C / H
        bias: bool = True,
        window: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.qkv = QKVProjection(hidden_size, num_heads, head_size, bias)
        self.out = Linear(self.qkv.weight.shape[0] // 3, hidden_size, bias)
        self.p = p
        self.window = window
        without_gradients(self)

    def forward(
        self,
        x: Tensor,  # (T, C)
        cu_seqlens: Tensor,  # (B + 1,) int32
        max_seqlen: int,
        seed: Tensor | None = None,
        site: int = 0,
        rows: Tensor | None = None,  # (R,) int64, the rows to compute; None: all
        rotary: F.Rotary | None = None,
    ) -> Tensor:
        if not self.qkv.num_heads:
            return bias_alone(x if rows is None else x.index_select(0, rows), self.out)
        rates = Rates(attention=self.p if self.training else 0.0)
        settings = LayerSettings(self.qkv.num_heads, rates=rates, window=self.window)
        call = LayerCall(
            cu_seqlens, max_seqlen, seed, site, rows, rotary=rotary, observer=self.observer
        )
        return attention_block(x, LayerWeights(qkv=self.qkv, out=self.out), settings, call)

    def probabilities(self, x: Tensor, packing: Packing, rotary: F.Rotary | None = None) -> Tensor:
        """The softmax weights (B, H, S, S) before dropout, zeros at padding: slow and large."""
        qkv = self.qkv(x) if self.qkv.num_heads else x.new_zeros(x.shape[0], 3, 0, 1)
        return attention_maps(qkv, packing, self.window, rotary)


class EncoderLayer(Block):
    """One encoder layer, which takes three dropout sites: LN(x + attention), then LN(x + feed-forward).

    With `pre_norm` it is x + attention(LN(x)), then x + feed_forward(LN(x)), the first LN only with `first_norm`; with
    `gated` the feed-forward is a GatedFeedForward. With `rows` all that follows attention is computed for these rows
    only, with the dropout of the whole: (R, C).
    """

    pre_norm = False  # on the class, as SelfAttention.window

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        head_size: int | None = None,
        approximate: str | None = "none",
        eps: float = 1e-12,
        p: float = 0.1,
        attention_p: float = 0.1,
        bias: bool = True,
        pre_norm: bool = False,
        gated: bool = False,
        window: tuple[int, int] | None = None,
        first_norm: bool = True,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(
            hidden_size, num_heads, p=attention_p, head_size=head_size, bias=bias, window=window
        )
        self.attention_norm: nn.Module = nn.Identity()
        if first_norm or not pre_norm:
            self.attention_norm = nn.LayerNorm(hidden_size, eps, bias=bias)
        self.feed_forward: FeedForward | GatedFeedForward
        if gated:
            activation = activation_name(approximate)
            self.feed_forward = GatedFeedForward(hidden_size, intermediate_size, activation, bias)
        else:
            self.feed_forward = FeedForward(hidden_size, intermediate_size, approximate, bias)
        self.output_norm = nn.LayerNorm(hidden_size, eps, bias=bias)
        self.p = p
        self.pre_norm = pre_norm
        self.norms_from_output = False

    def forward(
        self,
        x: Tensor,  # (T, C)
        cu_seqlens: Tensor,  # (B + 1,) int32
        max_seqlen: int,
        seed: Tensor | None = None,
        site: int = 0,
        rows: Tensor | None = None,  # (R,) int64, packed row numbers
        rotary: F.Rotary | None = None,
    ) -> Tensor:
        first, second = _norm_weights(self.attention_norm), _norm_weights(self.output_norm)
        weights = LayerWeights(
            attention_norm=first[0],
            attention_norm_bias=first[1],
            output_norm=second[0],
            output_norm_bias=second[1],
        )
        p = self.p if self.training else 0.0
        settings = LayerSettings(
            attention_eps=getattr(self.attention_norm, "eps", 0.0),
            output_eps=getattr(self.output_norm, "eps", 0.0),
            rates=Rates(out=p, down=p),
            pre_norm=self.pre_norm,
            norms_from_output=self.norms_from_output,
        )
        call = LayerCall(cu_seqlens, max_seqlen, seed, site, rows)

        def attention(x: Tensor) -> Tensor:
            return self.attention(x, cu_seqlens, max_seqlen, seed, site, rows, rotary)

        # the blocks are called as modules: their hooks see every call
        return encoder_layer(x, weights, settings, call, attention, self.feed_forward)

    def probabilities(self, x: Tensor, packing: Packing, rotary: F.Rotary | None = None) -> Tensor:
        """The attention weights of the layer's input, as SelfAttention.probabilities."""
        return self.attention.probabilities(self.attention_input(x), packing, rotary)

    def attention_input(self, x: Tensor) -> Tensor:
        """What attention computes of the layer's input (N, C): the input itself, or its norm."""
        return self.attention_norm(x) if self.pre_norm else x


def _norm_weights(norm: nn.Module) -> tuple[Any, Tensor | None]:
    """A LayerNorm's weight and bias; a norm of another kind, or one with hooks, and None: it is called."""
    if type(norm) is nn.LayerNorm and first_hooked((norm,)) is None:
        return norm.weight, norm.bias
    return norm, None


# the names of an EncoderLayer's parameters
PARAMETERS = LayerWeights(
    qkv="attention.qkv.weight",
    qkv_bias="attention.qkv.bias",
    out="attention.out.weight",
    out_bias="attention.out.bias",
    attention_norm="attention_norm.weight",
    attention_norm_bias="attention_norm.bias",
    up="feed_forward.up.weight",
    up_bias="feed_forward.up.bias",
    down="feed_forward.down.weight",
    down_bias="feed_forward.down.bias",
    output_norm="output_norm.weight",
    output_norm_bias="output_norm.bias",
)


class HeadTransform(Block):
    """What a head computes of a hidden state (N, C) before its last matrix: dense, activation, LayerNorm."""

    def __init__(
        self,
        hidden_size: int,
        *,
        approximate: str | None = "none",
        eps: float = 1e-12,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, bias)
        self.norm = nn.LayerNorm(hidden_size, eps, bias=bias)
        self.approximate = approximate

    def transform(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        if self.approximate is None:
            y = torch.relu(F.linear(x, self.dense.weight, self.dense.bias))
        else:
            y = F.bias_gelu(F.linear(x, self.dense.weight), self.dense.bias, self.approximate)
        return F.layer_norm(y, self.norm.weight, self.norm.bias, self.norm.eps)


class MLMHead(HeadTransform):
    """The masked-LM head: its transform, then the decoder to the vocabulary; tied unless `tied` is False.

    `word` is the word embedding (V, C), the decoder's weight where it is tied, or the module of its int8 rows. The
    decoder has a bias also where `bias` is False.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        approximate: str | None = "none",
        eps: float = 1e-12,
        tied: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(hidden_size, approximate=approximate, eps=eps, bias=bias)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.decoder = None if tied else nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, x: Tensor, word: Tensor | Int8Embedding) -> Tensor:
        """(T, C) -> logits (T, V)."""
        weight = self._weight(word)
        if isinstance(weight, Int8Embedding):
            return weight.scores(self.transform(x), self.bias)
        return F.linear(self.transform(x), weight, self.bias)

    def loss(
        self,
        x: Tensor,  # (R, C), the labelled rows
        labels: Tensor,  # (R,) int64
        word: Tensor | Int8Embedding,
        reduction: str = "mean",
    ) -> Tensor:
        """The masked-LM loss of labelled rows; 0, connected to the graph, where there is none."""
        weight = self._weight(word)
        if isinstance(weight, Int8Embedding):
            total = F.cross_entropy(self(x, word), labels, reduction="sum")
            return total / max(labels.shape[0], 1) if reduction == "mean" else total
        return F.mlm_loss(
            self.transform(x),
            weight,
            self.bias,
            labels,
            compacted=True,
            reduction=reduction,
        )

    def _weight(self, word: Tensor | Int8Embedding) -> Tensor | Int8Embedding:
        return word if self.decoder is None else self.decoder.weight


class NSPHead(Linear):
    """Next-sentence logits (B, 2) from the pooled first token (B, C): 0 is the next sentence, 1 a random one."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 2)
