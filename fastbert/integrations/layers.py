"""One encoder layer of a transformers model on packed tokens, with the layer's own modules and weights.

A weight is read where its module is an untouched one of torch.nn. Any other module, such as an adapter, is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert import nn as drop_in
from fastbert.files import quoted
from fastbert.integrations.families import Layout, Parts
from fastbert.nn.layer import (
    LayerCall,
    LayerSettings,
    LayerWeights,
    Rates,
    activation_name,
    encoder_layer,
    project,
)
from fastbert.nn.packing import Packing
from fastbert.nn.watch import first_hooked, hooked, log_once


class Call(NamedTuple):
    """What the layers of one forward share."""

    packing: Packing
    seed: Tensor | None
    packed: bool  # True: hidden states go from layer to layer as (1, T, C); False: as (B, S, C)
    # (R,) int64, the packed rows that a head reads; the last layer computes only these after its attention
    rows: Tensor | None = None
    firsts: bool = False  # True: `rows` are the sequences' first tokens
    layer: int = 0
    states_unused: bool = False  # True: no caller wants the intermediate hidden states
    # the parts of all layers, found and checked at the start of the forward; `at` leaves one layer's
    parts: tuple[Parts, ...] = ()
    # True: transformers' own layers take masks for sdpa; set with transformers 4 only
    sdpa: bool = False
    tokens: Tensor | None = None  # (B, S) bool: nothing is packed, and padding is computed too

    def at(self, layer: int, last: bool) -> Call:
        """The call for the layer of this number."""
        rows, parts = self.rows if last else None, self.parts[layer : layer + 1]
        return self._replace(layer=layer, rows=rows, parts=parts)

    def padded(self, x: Tensor) -> Tensor:
        """The last layer's output (T, C) or (R, C) as (B, S, C), with zeros elsewhere."""
        packing, rows = self.packing, self.rows
        if rows is None or packing.length is None:
            return packing.pad(x)
        if self.firsts:
            return tnf.pad(packing.of_starts(x)[:, None], (0, 0, 0, packing.length - 1))
        places = rows if packing.rows is None else packing.rows.index_select(0, rows)
        size = packing.batch * packing.length
        y = x.new_zeros((size, x.shape[1])).index_copy(0, places, x)
        return y.view(packing.batch, packing.length, x.shape[1])


# --- modules that may be read instead of called ---

_GELUS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
}
_FUNCTIONS = {
    *(getattr(torch, name) for name in ("relu", "sigmoid", "tanh", "selu", "celu")),
    *(
        getattr(tnf, name)
        for name in ("elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "relu")
    ),
    *(
        getattr(tnf, name)
        for name in ("relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh")
    ),
}
# packages whose hooks work on packed tokens too: they record hidden states, which are padded afterwards, or attentions,
# which no packed forward returns, or they make the embeddings' output require a gradient
RECORDERS = ("transformers.utils.", "transformers.modeling_utils", "peft.utils.")
_ORDINARY = (nn.Parameter, Tensor)
NORMS = (nn.LayerNorm, drop_in.LayerNorm)
# FSDP2 attaches hooks to the modules that it gathers
SHARDING = "torch.distributed."


def plain(m: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias of an nn.Linear without hooks and with ordinary tensors, None for any other module."""
    if type(m) is not nn.Linear or hooked(m, *RECORDERS):
        return None
    weight, bias = m.weight, m.bias
    if type(weight) in _ORDINARY and (bias is None or type(bias) in _ORDINARY):
        return weight, bias
    return None


def _adapter(m: nn.Module) -> bool:
    return type(m).__module__.startswith("peft.")


def _linear_like(m: nn.Module) -> bool:
    # a parametrized or quantised Linear has another class but keeps this forward
    return type(m).forward is nn.Linear.forward or _adapter(m)


def _norm_like(m: nn.Module) -> bool:
    return type(m).forward in (nn.LayerNorm.forward, drop_in.LayerNorm.forward) or _adapter(m)


def tokenwise(m: nn.Module) -> bool:
    """Whether a module computes each token by itself, so that it may run on packed tokens."""
    known = type(m).forward in (nn.Embedding.forward, nn.Dropout.forward)
    return known or _linear_like(m) or _norm_like(m)


def _dropout_like(m: nn.Module | None) -> bool:
    return m is None or (type(m) is nn.Dropout and 0.0 <= m.p < 1.0)


def elementwise(m: Any) -> bool:
    """Whether an activation, a module or a function, computes each element by itself."""
    if not isinstance(m, nn.Module):
        return m in _FUNCTIONS
    if gelu(m) is not None or type(m).__module__ == "transformers.activations":
        return True
    return type(m) in (nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.ELU, nn.Identity)


# (classes that fit, the test for other classes, names of the parts to check)
_CHECKS: tuple[tuple[tuple[type, ...], Callable[[Any], bool], tuple[str, ...]], ...] = (
    ((nn.Linear,), _linear_like, ("query", "key", "value", "out", "up", "down")),
    (NORMS, _norm_like, ("attention_norm", "output_norm")),
    ((), _dropout_like, ("attention_dropout", "out_dropout", "down_dropout")),
    ((), elementwise, ("activation",)),
)


def why_not_packed(layer: nn.Module, parts: Parts, layout: Layout, module: str) -> str | None:
    """Why a layer of these parts must be run by transformers' own code, None if it can be run here."""
    holders = layout.holding(layer)
    for path, holder in zip(layout.holders, holders, strict=True):
        if type(holder).__module__ != module:
            return f"its {'.'.join(path)} was replaced by a {type(holder).__name__}"
    if (seen := first_hooked(holders, *RECORDERS)) is not None:
        return f"hooks are attached to its {'.'.join(layout.holders[holders.index(seen)])}"
    if "feed_forward_chunk" in layer.__dict__ or "ff_chunk" in layer.__dict__:
        return "its feed_forward_chunk was replaced"
    if getattr(parts.core, "is_causal", False):
        return "its attention is causal"
    # transformers 4 only
    if getattr(parts.core, "position_embedding_type", "absolute") != "absolute":
        return f"its attention has {quoted(parts.core.position_embedding_type)} positions"
    # transformers 4's sdpa classes have a rate of their own
    if not 0.0 <= getattr(parts.core, "dropout_prob", 0.0) < 1.0:
        return f"its attention's dropout_prob is {parts.core.dropout_prob}"
    named: dict[str, nn.Module] = {}
    for known, fits, names in _CHECKS:
        for name in names:
            m = getattr(parts, name)
            if type(m) not in known and not fits(m):
                return f"its {name} is {str(m).splitlines()[0]}"
            if isinstance(m, nn.Module):
                named[name] = m
    if (seen := first_hooked(named.values(), *RECORDERS, SHARDING)) is not None:
        return f"hooks are attached to its {next(n for n, m in named.items() if m is seen)}"
    return None


# --- the layer ---


def run(m: Parts, x: Tensor, call: Call) -> Tensor:
    """One layer of these parts on packed tokens: (T, C), or (R, C) at call.rows. It takes three dropout sites."""
    packing, site = call.packing, 1 + 3 * call.layer
    batch = LayerCall(
        packing.cu_seqlens, packing.max_seqlen, call.seed, site, call.rows, call.tokens
    )
    return encoder_layer(x, weights(m), settings(m), batch)


def weights(m: Parts) -> LayerWeights:
    """The layer's parameters; a module that must be called takes the place of its weight."""
    qkv, qkv_bias = _fused(plain(m.query), plain(m.key), plain(m.value)) or (_separate(m), None)
    return LayerWeights(
        qkv,
        qkv_bias,
        *_weight_and_bias(m.out),
        *_norm(m.attention_norm),
        *_weight_and_bias(m.up),
        *_weight_and_bias(m.down),
        *_norm(m.output_norm),
    )


def _weight_and_bias(m: nn.Module) -> tuple[Any, Tensor | None]:
    """A Linear's weight and bias, or a function that calls it with the packed tokens as one sequence (1, T, C)."""
    return plain(m) or ((lambda x: m(x[None])[0]), None)


def _norm(m: Any) -> tuple[Any, Tensor | None]:
    """A norm's weight and bias, or the norm itself."""
    if type(m) in NORMS and len(m.normalized_shape) == 1 and m.bias is not None:
        return m.weight, m.bias
    return m, None


def _separate(m: Parts) -> Callable[[Tensor], Tensor]:
    """x (T, C) -> (T, 3, H, D) by three calls, for projections that do not fit into one product."""

    def project(x: Tensor) -> Tensor:
        qkv = torch.stack([_tokens(p, x) for p in (m.query, m.key, m.value)], 1)
        size = m.core.attention_head_size
        return qkv.view(*qkv.shape[:2], qkv.shape[2] // size, size)

    return project


def _tokens(m: nn.Module, x: Tensor) -> Tensor:
    return project(x, *_weight_and_bias(m))


def _fused(
    *own: tuple[Tensor, Tensor | None] | None,
) -> tuple[list[Tensor], list[Tensor] | None] | None:
    """The weights and biases of projections that fit into one product, None where they do not."""
    weights, biases = [], []
    for pair in own:
        if pair is None:
            return None
        weights.append(pair[0])
        biases.append(pair[1])
    first, first_bias = weights[0], biases[0]
    for weight, bias in zip(weights, biases, strict=True):
        if weight.shape != first.shape or weight.dtype != first.dtype:
            return None
        if (bias is None) != (first_bias is None):
            return None
        if bias is not None and bias.dtype != first.dtype:
            return None
    return weights, None if first_bias is None else biases  # type: ignore[return-value]


def rates(m: Parts) -> Rates:
    """The probabilities of the layer's dropouts now."""
    # transformers 4 keeps this rate on its sdpa classes
    attention = getattr(m.core, "dropout_prob", m.attention_dropout.p) if m.core.training else 0.0
    # written out, since every layer of every forward runs this
    out, down = m.out_dropout, m.down_dropout
    return Rates(
        attention,
        out.p if out is not None and out.training else 0.0,
        0.0,
        down.p if down is not None and down.training else 0.0,
    )


def settings(m: Parts) -> LayerSettings:
    """The layer's settings as its modules hold them now."""
    core, size = m.core, m.core.attention_head_size
    activation = gelu(m.activation)
    if activation is None:
        log_once(
            f"accelerate: the activation {type(m.activation).__name__} is transformers', not fused"
        )
    return LayerSettings(
        # an adapter's projection has its own shape
        getattr(m.query, "out_features", size) // size,
        m.activation if activation is None else activation_name(activation),
        getattr(m.attention_norm, "eps", 0.0),
        getattr(m.output_norm, "eps", 0.0),
        rates(m),
        # transformers 4 names no scale
        getattr(core, "scaling", size**-0.5),
    )


def gelu(activation: Any) -> str | None:
    """The `approximate` of a GELU, None for any other activation."""
    if type(activation) in (nn.GELU, drop_in.GELU):
        return activation.approximate
    if activation is nn.functional.gelu:
        return "none"
    kind = type(activation)
    return _GELUS.get(kind.__name__) if kind.__module__ == "transformers.activations" else None
