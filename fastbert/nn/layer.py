"""One encoder layer as a function of its weights, on packed tokens (T, C).

BERT's own layer (blocks.py), torch.nn's (transformer.py), transformers' under accelerate() and the native encoder of
freeze() are this layer: it is written here and in csrc/cpu/encoder.cpp, and `LayerWeights` is the order of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert import functional as F
from fastbert.backend.reference import philox
from fastbert.backend.stock.attention import padded
from fastbert.ops.context import seed_for

# the values of `approximate` of the activations that are fused with the feed-forward's products
GELUS = {"gelu": "none", "gelu_tanh": "tanh", "gelu_sigmoid": "sigmoid"}
_NAMES: dict[str | None, str] = {form: name for name, form in GELUS.items()} | {None: "relu"}
# the activations that are fused with a gate
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")


class LayerWeights(NamedTuple):
    """The parameters of an encoder layer; csrc/cpu/encoder.h reads them in this order.

    A matrix is (outputs, inputs). `qkv` is a list: one (3 H D, C), or queries, keys and values (H D, C) each; so is
    `qkv_bias`. In a gated layer `up` and `up_bias` are lists too: one (2 F, C), or two (F, C), of which the first is
    activated. A bias is None where the layer has none. A module in the place of a weight is called, and its bias is
    None: `qkv` gives (T, 3, H, D), a gated `up` (T, 2 F). That serves adapters, hooks and norms of another kind. A
    function that runs a part of the layer reads the fields of that part only.
    """

    qkv: Any = None  # [(3 H D, C)]
    qkv_bias: Any = None  # [(3 H D,)]
    out: Any = None  # (C, H D)
    out_bias: Any = None  # (C,)
    attention_norm: Any = None  # (C,)
    attention_norm_bias: Any = None  # (C,)
    up: Any = None  # (F, C)
    up_bias: Any = None  # (F,)
    down: Any = None  # (C, F)
    down_bias: Any = None  # (C,)
    output_norm: Any = None  # (C,)
    output_norm_bias: Any = None  # (C,)

    @classmethod
    def shapes(cls, width: int, heads_width: int, intermediate: int) -> LayerWeights:
        """The shapes of a whole layer's weights, `qkv` as one; C, H D and F in this order."""
        C, A, F_ = width, heads_width, intermediate
        return cls(
            *((3 * A, C), (3 * A,), (C, A), (C,), (C,), (C,)),
            *((F_, C), (F_,), (C, F_), (C,), (C,), (C,)),
        )


class Rates(NamedTuple):
    """Probabilities of a layer's dropouts, 0 in evaluation."""

    attention: float = 0.0  # of attention weights
    out: float = 0.0  # after the attention's output projection
    inner: float = 0.0  # between the feed-forward's products
    down: float = 0.0  # after the feed-forward


class LayerSettings(NamedTuple):
    """What a layer computes, beside its weights; every layer of a model may have its own."""

    heads: int = 1
    activation: Any = "gelu"  # one of GELUS, silu, relu, or a function of a tensor
    attention_eps: float = 1e-12
    output_eps: float = 1e-12
    rates: Rates = Rates()
    scale: float | None = None  # of attention scores; None: D ** -0.5
    # LN before a block instead of after its residual sum
    pre_norm: bool = False
    causal: bool = False
    # whether the inner dropout has a site of its own: a layer takes four sites then, else three
    inner_site: bool = False
    # norms keep their outputs for backward, not their inputs (functional.dropout_add_layer_norm)
    norms_from_output: bool = False
    window: tuple[int, int] | None = None  # the tokens before and behind that a token sees
    kv_heads: int | None = None  # None: as many as `heads`; then `qkv` gives (T, H + 2 kv_heads, D)
    # the feed-forward is (act(a) * g) down' with [a, g] = x up'
    gated: bool = False
    rms_norm: bool = False


class LayerCall(NamedTuple):
    """The batch that a layer sees."""

    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int
    seed: Tensor | None = None  # (1,) int64; None: every dropout draws its own
    site: int = 0  # the first of the layer's dropout sites
    rows: Tensor | None = None  # (R,) int64: the rows to compute after attention; None: all
    # (B, S) bool, True at tokens: x is a padded batch (B * S, C), and padding attends to the tokens as in torch.nn
    tokens: Tensor | None = None
    rotary: F.Rotary | None = None
    bias: Tensor | None = None  # (H, 2 P - 1), of relative positions
    # sees attention's work on packed tokens, for attention_maps.py and fastbert.interpret
    observer: Observer | None = None


Block = Callable[[Tensor], Tensor]
# called with qkv, attention's output (T, H, D), its log-sum-exps (H, T), and the layer's settings and call
Observer = Callable[[Tensor, Tensor, Tensor, LayerSettings, LayerCall], None]


def encoder_layer(
    x: Tensor,  # (T, C)
    w: LayerWeights,
    s: LayerSettings,
    c: LayerCall,
    attention: Block | None = None,
    feed_forward: Block | None = None,
) -> Tensor:
    """The layer's output (T, C), or (R, C) at c.rows, with the dropout of the whole.

    post-norm: x = LN(x + attention(x)), then LN(x + feed_forward(x)); pre-norm: x = x + attention(LN(x)), then
    x + feed_forward(LN(x)). `attention` and `feed_forward` are called in place of the blocks below where given.
    """
    p, last = s.rates, c.site + 2 + s.inner_site
    before = _Norm(w.attention_norm, w.attention_norm_bias, s.attention_eps, s.rms_norm)
    after = _Norm(w.output_norm, w.output_norm_bias, s.output_eps, s.rms_norm)
    first = before(x) if s.pre_norm else x
    y = attention_block(first, w, s, c) if attention is None else attention(first)
    x = x if c.rows is None else x.index_select(0, c.rows)
    if s.pre_norm:
        y, x = _add_norm_and_sum(y, x, after, p.out, c, c.site + 1)
        y = feed_forward_block(y, w, s, c) if feed_forward is None else feed_forward(y)
        return x + _dropout(y, p.down, c, last)
    x = _add_norm(y, x, before, p.out, c, c.site + 1, s.norms_from_output)
    y = feed_forward_block(x, w, s, c) if feed_forward is None else feed_forward(x)
    return _add_norm(y, x, after, p.down, c, last, s.norms_from_output)


def attention_block(x: Tensor, w: LayerWeights, s: LayerSettings, c: LayerCall) -> Tensor:
    """Self-attention inside each sequence and the output projection: (T, C) -> (T, C), or (R, C) at c.rows."""
    qkv = w.qkv(x) if callable(w.qkv) else F.qkv_proj(x, w.qkv, w.qkv_bias, s.heads)
    p = s.rates.attention
    form: dict[str, Any] = {
        "scale": s.scale,
        "p": p,
        "causal": s.causal,
        "window": s.window,
        "kv_heads": s.kv_heads,
        "rotary": c.rotary,
        "bias": c.bias,
    }
    if c.tokens is not None:
        y = padded(qkv, c.tokens, c.max_seqlen, **form)
    else:
        drop: dict[str, Any] = {"seed": c.seed if p else None, "site": c.site}
        watched = c.observer is not None
        y = F.attention(qkv, c.cu_seqlens, c.max_seqlen, **form, **drop, return_lse=watched)
    if c.observer is not None and isinstance(y, tuple):
        y, lse = y
        c.observer(qkv, y, lse, s, c)
    assert isinstance(y, Tensor)  # a pair only with return_lse
    y = y.flatten(1)
    return project(y if c.rows is None else y.index_select(0, c.rows), w.out, w.out_bias)


def feed_forward_block(
    x: Tensor, w: LayerWeights, s: LayerSettings, c: LayerCall | None = None
) -> Tensor:
    """act(x up' + up_bias) down' + down_bias, or gated: (T, C) -> (T, C); `c` is read for an inner dropout only."""
    approximate = GELUS.get(s.activation) if isinstance(s.activation, str) else None
    p = s.rates.inner
    if s.gated:
        up = w.up if isinstance(w.up, (list, tuple)) else [w.up]
        if p == 0.0 and s.activation in ACTIVATIONS and not any(map(callable, (*up, w.down))):
            return F.gated_feed_forward(x, up, w.up_bias, w.down, w.down_bias, s.activation)
        hidden = _gated(x, up, w.up_bias, s.activation)
    elif approximate is not None and not callable(w.up):
        if p == 0.0 and not callable(w.down):
            return F.feed_forward(x, w.up, w.up_bias, w.down, w.down_bias, approximate)
        hidden = F.bias_gelu(F.linear(x, w.up), w.up_bias, approximate)
    else:
        hidden = activate(project(x, w.up, w.up_bias), s.activation)
    if p:
        assert c is not None
        hidden = _dropout(hidden, p, c, c.site + 2)
    return project(hidden, w.down, w.down_bias)


def _gated(
    x: Tensor, weights: Sequence[Any], biases: Sequence[Tensor] | None, activation: Any
) -> Tensor:
    """act(a) * g with [a, g] = x up' + up_bias, which one weight or two give."""
    products = [
        project(x, weight, None if biases is None else biases[i])
        for i, weight in enumerate(weights)
    ]
    a, g = products if len(products) == 2 else products[0].chunk(2, -1)
    return activate(a, activation) * g


def activate(x: Tensor, activation: Any) -> Tensor:
    """The activation, by its name or as a function, of a tensor."""
    if activation == "relu":
        return torch.relu(x)
    if activation == "silu":
        return torch.nn.functional.silu(x)
    if callable(activation):
        return activation(x)
    return F.bias_gelu(x, None, GELUS[activation])


def activation_name(approximate: str | None) -> str:
    """The name of the activation whose `approximate` is one of GELU's forms, or None (ReLU)."""
    return _NAMES[approximate]


def project(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """x weight' + bias, or the module in the place of the weight, called."""
    return weight(x) if callable(weight) else F.linear(x, weight, bias)


def _dropout(x: Tensor, p: float, c: LayerCall, site: int) -> Tensor:
    return x if p == 0.0 else philox.dropout(x, p, seed_for(p, c.seed, x), site, c.rows)


class _Norm(NamedTuple):
    """One of the layer's norms: a LayerNorm, an RMSNorm, or a module in the place of the weight, which is called."""

    weight: Any
    bias: Tensor | None
    eps: float
    rms: bool

    def __call__(self, x: Tensor) -> Tensor:
        if callable(self.weight):
            return self.weight(x)
        if self.rms:
            return F.rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, self.weight, self.bias, self.eps)


def _add_norm(
    y: Tensor, residual: Tensor, norm: _Norm, p: float, c: LayerCall, site: int, from_output: bool
) -> Tensor:
    """norm(residual + dropout(y))."""
    # written out here and below, since every layer of every forward runs this
    if norm.rms or norm.weight is None or callable(norm.weight):
        return norm(residual + _dropout(y, p, c, site))
    found = F.dropout_add_layer_norm(
        y,
        residual,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        p=p,
        seed=c.seed if p else None,
        site=site,
        rows=c.rows if p else None,
        from_output=from_output and norm.bias is not None,
    )
    assert isinstance(found, Tensor)  # a pair only with return_sum
    return found


def _add_norm_and_sum(
    y: Tensor, residual: Tensor, norm: _Norm, p: float, c: LayerCall, site: int
) -> tuple[Tensor, Tensor]:
    """norm(z) and z = residual + dropout(y), in the wider dtype of the two: the sum of all blocks is not rounded."""
    if norm.rms or norm.weight is None or callable(norm.weight):
        z = residual + _dropout(y, p, c, site)
        return norm(z), z
    y = y.to(torch.promote_types(y.dtype, residual.dtype))
    drop: dict[str, Any] = {"p": p, "site": site}
    if p:
        drop |= {"seed": c.seed, "rows": c.rows}
    found = F.dropout_add_layer_norm(
        y, residual, norm.weight, norm.bias, eps=norm.eps, **drop, return_sum=True
    )
    assert isinstance(found, tuple)
    return found


def parameters(w: LayerWeights) -> Sequence[Sequence[Tensor]] | None:
    """Every field as a list of tensors, for weights that are prepacked; None where a module must be called.

    The list is empty where the layer has no such parameter, and for an Identity in the place of a norm.
    """
    fields: list[list[Any]] = []
    for f in w:
        absent = f is None or type(f) is torch.nn.Identity
        fields.append([] if absent else list(f) if isinstance(f, (list, tuple)) else [f])
    return fields if all(isinstance(t, Tensor) for f in fields for t in f) else None
