"""One encoder layer of a transformers model on packed tokens, with the layer's own modules and weights.

A weight is read only where its module is exactly torch.nn's, untouched; an adapter, or whatever else was put there, is
called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as stock

from fastbert import functional as F
from fastbert import nn as drop_in
from fastbert.blocks import attend, hooked, log_once
from fastbert.integrations.families import Layout, Parts
from fastbert.packing import Packing


class Call(NamedTuple):
    """What the layers of one forward share."""

    packing: Packing
    seed: Tensor | None
    packed: bool  # whether hidden states go from layer to layer as (1, T, C), or as (B, S, C)
    # (R,) int64, the packed rows that a head reads: what follows the last layer's attention leaves out the others
    rows: Tensor | None = None
    firsts: bool = False  # whether these are the sequences' first tokens
    layer: int = 0
    sdpa: bool = False  # whether transformers' own layers want masks for sdpa; known with transformers 4 only

    def at(self, layer: int, last: bool) -> Call:
        """What the layer of this number sees."""
        return self._replace(layer=layer, rows=self.rows if last else None)

    def padded(self, x: Tensor) -> Tensor:
        """What the last layer returned, (T, C) or (R, C), as (B, S, C), zeros elsewhere."""
        packing, rows = self.packing, self.rows
        if rows is None or packing.length is None:
            return packing.pad(x)
        if self.firsts:
            return stock.pad(packing.of_starts(x)[:, None], (0, 0, 0, packing.length - 1))
        places = rows if packing.rows is None else packing.rows.index_select(0, rows)
        size = packing.batch * packing.length
        y = x.new_zeros((size, x.shape[1])).index_copy(0, places, x)
        return y.view(packing.batch, packing.length, x.shape[1])


# --- what may be read or bypassed ---

_GELUS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
}
# hooks that packed tokens do not matter to: those that record hidden states, which are padded afterwards, and
# attentions, which are not asked for here; those that make the embeddings' output require a gradient
RECORDERS = ("transformers.utils.", "transformers.modeling_utils", "peft.utils.")
# FSDP2's, on modules that are called
SHARDING = "torch.distributed."


def plain(m: nn.Module) -> bool:
    """Whether a Linear's weight says everything about it: exactly nn.Linear, untouched, with ordinary tensors."""
    ordinary = (nn.Parameter, Tensor)
    return (
        type(m) is nn.Linear
        and type(m.weight) in ordinary
        and (m.bias is None or type(m.bias) in ordinary)
        and not hooked(m, *RECORDERS)
    )


def _adapter(m: nn.Module) -> bool:
    return type(m).__module__.startswith("peft.")


def _linear_like(m: nn.Module) -> bool:
    # parametrized and quantised ones have another class or another kind of weight, and this forward
    return type(m).forward is nn.Linear.forward or _adapter(m)


def _norm_like(m: nn.Module) -> bool:
    return type(m).forward in (nn.LayerNorm.forward, drop_in.LayerNorm.forward) or _adapter(m)


def tokenwise(m: nn.Module) -> bool:
    """Whether a part of the embeddings or a head treats every token by itself, and may see them packed."""
    known = type(m).forward in (nn.Embedding.forward, nn.Dropout.forward)
    return known or _linear_like(m) or _norm_like(m)


def _dropout_like(m: nn.Module | None) -> bool:
    return m is None or (type(m) is nn.Dropout and 0.0 <= m.p < 1.0)


def elementwise(m: Any) -> bool:
    """Whether an activation, a module or a function, treats every number by itself."""
    if not isinstance(m, nn.Module):
        return getattr(m, "__module__", None) in ("torch.nn.functional", "torch._C._nn", "torch")
    if _gelu(m) is not None or type(m).__module__ == "transformers.activations":
        return True
    return type(m) in (nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.ELU, nn.Identity)


def unsuited(layer: nn.Module, layout: Layout, module: str) -> str | None:
    """Why a layer must be run by transformers' own code, None if it can be run here."""
    parts = layout.of(layer)
    for name, holder in zip(layout.holders, layout.holding(layer), strict=True):
        if type(holder).__module__ != module:
            return f"its {name} was replaced by a {type(holder).__name__}"
        if hooked(holder, *RECORDERS):
            return f"hooks are attached to its {name}"
    if getattr(parts.core, "is_causal", False):
        return "its attention is causal"
    # transformers 4 only
    if getattr(parts.core, "position_embedding_type", "absolute") != "absolute":
        return f"its attention has {parts.core.position_embedding_type!r} positions"
    checks = (
        (_linear_like, ("query", "key", "value", "out", "up", "down")),
        (_norm_like, ("attention_norm", "output_norm")),
        (_dropout_like, ("attention_dropout", "out_dropout", "down_dropout")),
        (elementwise, ("activation",)),
    )
    for fits, names in checks:
        for name in names:
            m = getattr(parts, name)
            if not fits(m):
                return f"its {name} is {str(m).splitlines()[0]}"
            if isinstance(m, nn.Module) and hooked(m, *RECORDERS, SHARDING):
                return f"hooks are attached to its {name}"
    # transformers 4's sdpa classes have a rate of their own
    if not 0.0 <= getattr(parts.core, "dropout_prob", 0.0) < 1.0:
        return f"its attention's dropout_prob is {parts.core.dropout_prob}"
    return None


# --- the layer ---


def run(layer: nn.Module, layout: Layout, x: Tensor, call: Call) -> Tensor:
    """One layer on packed tokens: LN(x + attention), then LN(x + feed-forward), (T, C), or (R, C) at call.rows.

    It takes three dropout sites.
    """
    m, rows = layout.of(layer), call.rows
    site = 1 + 3 * call.layer
    y = _attention(m, x, call, site)
    if rows is not None:
        x, y = x.index_select(0, rows), y.index_select(0, rows)
    x = _add_norm(m.attention_norm, m.out_dropout, _tokens(m.out, y), x, call, site + 1)
    y = _feed_forward(m, x)
    return _add_norm(m.output_norm, m.down_dropout, y, x, call, site + 2)


def _tokens(m: nn.Module, x: Tensor) -> Tensor:
    """A Linear, or what stands in its place, on packed tokens; the latter sees a batch of one sequence."""
    if plain(m):
        return F.linear(x, m.weight, m.bias)  # type: ignore[arg-type]
    return m(x[None])[0]


def _attention(m: Parts, x: Tensor, call: Call, site: int) -> Tensor:
    """(T, C) -> (T, H * D), before the output projection."""
    projections = (m.query, m.key, m.value)
    size = m.core.attention_head_size
    biases = [p.bias for p in projections if plain(p) and p.bias is not None]
    if all(map(plain, projections)) and _alike(*projections) and len(biases) in (0, 3):
        heads = m.query.out_features // size
        qkv = F.qkv_proj(x, [p.weight for p in projections], biases, heads)
    else:
        qkv = torch.stack([_tokens(p, x) for p in projections], 1)
        qkv = qkv.view(*qkv.shape[:2], qkv.shape[2] // size, size)
    # transformers 4 names no scale
    p = getattr(m.core, "dropout_prob", m.attention_dropout.p) if m.core.training else 0.0
    scale = getattr(m.core, "scaling", size**-0.5)
    packing = call.packing
    options = {"scale": scale, "p": p, "seed": call.seed if p else None, "site": site}
    return attend(qkv, packing.cu_seqlens, packing.max_seqlen, **options)


def _alike(first: nn.Linear, *others: nn.Linear) -> bool:
    """Whether one GEMM can do all of them."""
    weight = first.weight
    return all(
        o.weight.shape == weight.shape and o.weight.dtype == weight.dtype for o in others
    ) and all(p.bias is None or p.bias.dtype == weight.dtype for p in (first, *others))


def _gelu(activation: Any) -> str | None:
    """The `approximate` of a GELU, None for any other activation."""
    if type(activation) in (nn.GELU, drop_in.GELU):
        return activation.approximate
    if activation is nn.functional.gelu:
        return "none"
    kind = type(activation)
    return _GELUS.get(kind.__name__) if kind.__module__ == "transformers.activations" else None


def _feed_forward(m: Parts, x: Tensor) -> Tensor:
    up, down, approximate = m.up, m.down, _gelu(m.activation)
    if approximate is not None and plain(up) and plain(down):
        return F.feed_forward(x, up.weight, up.bias, down.weight, down.bias, approximate)
    if approximate is None:
        log_once(
            f"accelerate: the activation {type(m.activation).__name__} is transformers', not fused"
        )
    return _tokens(down, m.activation(_tokens(up, x)))


def _add_norm(
    norm: Any, dropout: Any, y: Tensor, residual: Tensor, call: Call, site: int
) -> Tensor:
    p = dropout.p if dropout is not None and dropout.training else 0.0
    exact = type(norm) in (nn.LayerNorm, drop_in.LayerNorm)
    if exact and len(norm.normalized_shape) == 1 and norm.bias is not None:
        return F.dropout_add_layer_norm(
            y,
            residual,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            p=p,
            seed=call.seed if p else None,
            site=site,
            rows=call.rows if p else None,
        )
    return norm(residual + (y if dropout is None else dropout(y)))
