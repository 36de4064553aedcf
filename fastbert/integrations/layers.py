"""One encoder layer of a transformers model on packed tokens, with the layer's own modules and weights.

A weight is read where its module is an untouched one of torch.nn. Any other module, such as an adapter, is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert.files import quoted
from fastbert.integrations import disentangled
from fastbert.integrations.families import Family, Layout, Parts
from fastbert.integrations.recognise import (
    NORMS,
    RECORDERS,
    SHARDING,
    dropout_like,
    elementwise,
    gelu,
    layer_norm,
    linear_like,
    norm_like,
    plain,
    rms_norm,
    silu,
)
from fastbert.nn.layer import (
    LayerCall,
    LayerSettings,
    LayerWeights,
    Observer,
    Rates,
    activation_name,
    encoder_layer,
    project,
)
from fastbert.nn.packing import Packing
from fastbert.nn.watch import first_hooked, log_once
from fastbert.runners.forms import Form

_PLAIN = Form()


@dataclass
class Whole:
    """A frozen model whose own code runs its layers: where the copies serve, the first layer runs all of them."""

    model: nn.Module
    served: bool = False  # True: the copies have run all layers, and the others pass their input on


class Call(NamedTuple):
    """What the layers of one forward share."""

    family: Family
    packing: Packing
    seed: Tensor | None
    packed: bool  # True: hidden states go from layer to layer as (1, T, C); False: as (B, S, C)
    # (R,) int64, the packed rows that a head reads; the last layer computes only these after its attention
    rows: Tensor | None = None
    firsts: bool = False  # True: `rows` are the sequences' first tokens
    layer: int = 0
    last: bool = False  # True: this is the last layer's call
    states_unused: bool = False  # True: no caller wants the intermediate hidden states
    stacked: tuple[nn.Module, ...] = ()  # the layers in the order in which they run
    # the parts of all layers, found and checked at the start of the forward; `at` leaves one layer's
    parts: tuple[Parts, ...] = ()
    forms: tuple[Form, ...] = ()  # of all layers, or of one as `parts`
    relative: disentangled.Relative | None = (
        None  # for attention with terms of content and position
    )
    # the layers' numbers by id, where the model's own code runs them
    numbers: dict[int, int] | None = None
    # True: transformers' own layers take masks for sdpa; set with transformers 4 only
    sdpa: bool = False
    tokens: Tensor | None = None  # (B, S) bool: nothing is packed, and padding is computed too
    # where the model's own code runs the layers and the model is frozen
    whole: Whole | None = None
    observer: Observer | None = None

    def at(self, layer: int) -> Call:
        """The call for the layer of this number."""
        one, last = slice(layer, layer + 1), layer == len(self.parts) - 1
        parts, forms = self.parts[one], self.forms[one]
        rows = self.rows if last else None
        return self._replace(
            layer=layer, last=last, rows=rows, parts=parts, forms=forms, numbers=None
        )

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

    def shown(self, output: Any) -> Any:
        """The output of transformers' forward on (1, T) with its hidden states as (B, S, C), zeros at padding."""
        family, packing = self.family, self.packing
        if family.sequence is not None:
            return self._shown_late(output)
        last = shown = output.last_hidden_state
        if family.last and not family.encoder:
            shown = self.padded(last[0])
        elif family.end:
            shown = packing.pad(packing.unpad(last))
        if output.get("hidden_states"):
            # the last hidden state is the output itself; states that were not requested are None
            output["hidden_states"] = tuple(
                shown if h is last else h if h is None else packing.pad(h[0])
                for h in output.hidden_states
            )
        output["last_hidden_state"] = shown
        return output

    def _shown_late(self, output: Any) -> Any:
        """`shown` for a model that runs its embeddings, and what stands behind its layers, on the padded batch."""
        packing, states = self.packing, output.get("hidden_states")
        # norms make other numbers of the zeros at padding
        emptied = self.tokens is None and packing.rows is not None
        size = (packing.batch, packing.length)

        def show(h: Any) -> Any:
            if h is None:
                return None
            if h.shape[:2] != size:
                return packing.pad(h[0])
            return packing.pad(packing.unpad(h)) if emptied else h

        if states:
            output["hidden_states"] = tuple(map(show, states))
        output["last_hidden_state"] = show(output.last_hidden_state)
        return output


# --- whether a layer can be run here ---

# (classes that fit, the test for other classes, names of the parts to check)
_CHECKS: tuple[tuple[tuple[type, ...], Callable[[Any], bool], tuple[str, ...]], ...] = (
    ((nn.Linear,), linear_like, ("query", "key", "value", "out", "up", "down", "fused", "gate")),
    (NORMS, norm_like, ("attention_norm", "output_norm")),
    ((), dropout_like, ("attention_dropout", "out_dropout", "down_dropout", "inner_dropout")),
    ((), elementwise, ("activation",)),
)


def why_not_packed(layer: nn.Module, parts: Parts, family: Family) -> str | None:
    """Why a layer of these parts must be run by transformers' own code, None if it can be run here."""
    layout, module = family.layout, family.module
    holders = layout.holding(layer)
    for path, holder in zip(layout.holders, holders, strict=True):
        if type(holder).__module__ != module:
            return f"its {'.'.join(path)} was replaced by a {type(holder).__name__}"
    if (seen := first_hooked(holders, *RECORDERS)) is not None:
        return f"hooks are attached to its {'.'.join(layout.holders[holders.index(seen)])}"
    if "feed_forward_chunk" in layer.__dict__ or "ff_chunk" in layer.__dict__:
        return "its feed_forward_chunk was replaced"
    window = getattr(parts.core, "sliding_window", None)
    if window is not None and window < 2:
        return f"its sliding window is of {window - 1} tokens to each side"
    if getattr(parts.core, "is_causal", False):
        return "its attention is causal"
    if family.disentangled and (reason := disentangled.why_not(parts.core)):
        return reason
    # transformers 4, and ESM
    turned = "rotary" if family.rotary else "absolute"
    if getattr(parts.core, "position_embedding_type", turned) not in ("absolute", turned):
        return f"its attention has {quoted(parts.core.position_embedding_type)} positions"
    # transformers 4's sdpa classes have a rate of their own
    if not 0.0 <= getattr(parts.core, "dropout_prob", 0.0) < 1.0:
        return f"its attention's dropout_prob is {parts.core.dropout_prob}"
    named: dict[str, nn.Module] = {}
    for known, fits, names in _CHECKS:
        for name in names:
            m = getattr(parts, name)
            if name in layout.absent:
                continue
            if type(m) not in known and not fits(m):
                return f"its {name} is {str(m).splitlines()[0]}"
            if isinstance(m, nn.Module):
                named[name] = m
    if (seen := first_hooked(named.values(), *RECORDERS, SHARDING)) is not None:
        return f"hooks are attached to its {next(n for n, m in named.items() if m is seen)}"
    return None


# --- the layer ---


def run(m: Parts, x: Tensor, call: Call) -> Tensor:
    """One layer of these parts on packed tokens: (T, C), or (R, C) at call.rows."""
    packing, layout = call.packing, call.family.layout
    s = settings(m, layout)
    form = call.forms[0] if call.forms else _PLAIN
    site = 1 + (3 + s.inner_site) * call.layer
    batch = LayerCall(
        packing.cu_seqlens,
        packing.max_seqlen,
        call.seed,
        site,
        call.rows,
        call.tokens,
        form.rotary,
        form.bias,
        call.observer,
    )
    w, attention = weights(m, layout), None
    if call.relative is not None and disentangled.terms(m.core):
        attention = disentangled.attention(m, w, s, call.relative, call.rows)
    return encoder_layer(x, w, s._replace(window=form.window), batch, attention)


def weights(m: Parts, layout: Layout) -> LayerWeights:
    """The layer's parameters; a module that must be called takes the place of its weight."""
    if m.fused is not None:
        qkv, qkv_bias = _listed(_projection(m, m.fused))
    else:
        known = _fused(*_projections(m))
        qkv, qkv_bias = known or (_separate(m), None)
    up, up_bias = _halves(m) if layout.gated else _weight_and_bias(m.up)
    return LayerWeights(
        qkv,
        qkv_bias,
        *_weight_and_bias(m.out),
        *_norm(m.attention_norm),
        up,
        up_bias,
        *_weight_and_bias(m.down),
        *_norm(m.output_norm),
    )


def prepacked_weights(m: Parts, layout: Layout) -> LayerWeights:
    """The layer's parameters for one product of queries, keys and values, also where keys have fewer heads."""
    w = weights(m, layout)
    if not callable(w.qkv) or m.fused is not None:
        return w
    known = _fused(*_projections(m), equal=False)
    return w if known is None else w._replace(qkv=known[0], qkv_bias=known[1])


def _projections(m: Parts) -> list[tuple[Tensor, Tensor | None] | None]:
    return [plain(m.query), plain(m.key), plain(m.value)]


def _weight_and_bias(m: nn.Module) -> tuple[Any, Tensor | None]:
    """A Linear's weight and bias, or a function that calls it with the packed tokens as one sequence (1, T, C)."""
    return plain(m) or ((lambda x: m(x[None])[0]), None)


def _listed(pair: tuple[Any, Tensor | None]) -> tuple[Any, list[Tensor] | None]:
    """A weight and a bias as lists of one; a function stays alone."""
    weight, bias = pair
    return (weight, None) if callable(weight) else ([weight], None if bias is None else [bias])


def _projection(m: Parts, fused: nn.Module) -> tuple[Any, Tensor | None]:
    """The weight and bias of one projection of queries, keys and values, or a function x (T, C) -> (T, 3, H, D)."""
    if disentangled.by_head(m.core):
        return (lambda x: disentangled.heads_of(_tokens(fused, x), m.core)), None
    if (own := plain(fused)) is not None:
        return own
    size = head_size(m)
    return (lambda x: fused(x[None])[0].view(x.shape[0], 3, -1, size)), None


def _halves(m: Parts) -> tuple[Any, Any]:
    """The first weights and biases of a gated feed-forward as lists, with the gate first."""
    if m.gate is None:
        return _listed(_weight_and_bias(m.up))
    known = _fused(plain(m.gate), plain(m.up))
    if known is not None:
        return known
    return (lambda x: torch.cat([_tokens(p, x) for p in (m.gate, m.up)], -1)), None


def _norm(m: Any) -> tuple[Any, Tensor | None]:
    """A norm's weight and bias, or the norm itself."""
    if type(m) in NORMS and len(m.normalized_shape) == 1 and m.weight is not None:
        return m.weight, m.bias
    if layer_norm(m):
        return m.weight, m.bias
    return (m.weight, None) if rms_norm(m) else (m, None)


def head_size(m: Parts) -> int:
    """D of the layer's attention."""
    size = getattr(m.core, "attention_head_size", None)
    return m.core.head_dim if size is None else size


def _separate(m: Parts) -> Callable[[Tensor], Tensor]:
    """x (T, C) -> (T, 3, H, D) or (T, H + 2 kv_heads, D) by three calls: they do not fit into one product."""

    def project(x: Tensor) -> Tensor:
        parts = [_tokens(p, x).unflatten(1, (-1, head_size(m))) for p in (m.query, m.key, m.value)]
        equal = parts[0].shape == parts[1].shape
        return torch.stack(parts, 1) if equal else torch.cat(parts, 1)

    return project


def _tokens(m: nn.Module, x: Tensor) -> Tensor:
    return project(x, *_weight_and_bias(m))


def _fused(
    *own: tuple[Tensor, Tensor | None] | None,
    equal: bool = True,
) -> tuple[list[Tensor], list[Tensor] | None] | None:
    """The weights and biases of projections that fit into one product, None where they do not; `equal`: in size."""
    weights, biases = [], []
    for pair in own:
        if pair is None:
            return None
        weights.append(pair[0])
        biases.append(pair[1])
    first, first_bias = weights[0], biases[0]
    for weight, bias in zip(weights, biases, strict=True):
        if weight.shape[-1] != first.shape[-1] or weight.dtype != first.dtype:
            return None
        if equal and weight.shape != first.shape:
            return None
        if (bias is None) != (first_bias is None):
            return None
        if bias is not None and bias.dtype != first.dtype:
            return None
    return weights, None if first_bias is None else biases  # type: ignore[return-value]


def rates(m: Parts) -> Rates:
    """The probabilities of the layer's dropouts now."""
    attention = 0.0
    if m.core.training:
        kept = m.attention_dropout
        # transformers 4 keeps this rate on its sdpa classes
        attention = getattr(m.core, "dropout_prob", kept if isinstance(kept, float) else kept.p)
    # written out, since every layer of every forward runs this
    out, inner, down = m.out_dropout, m.inner_dropout, m.down_dropout
    return Rates(
        attention,
        out.p if type(out) is nn.Dropout and out.training else 0.0,
        inner.p if type(inner) is nn.Dropout and inner.training else 0.0,
        down.p if type(down) is nn.Dropout and down.training else 0.0,
    )


def settings(m: Parts, layout: Layout) -> LayerSettings:
    """The layer's settings as its modules hold them now."""
    core, size = m.core, head_size(m)
    activation = "none" if m.activation is None else gelu(m.activation)
    fused = activation is not None or (layout.gated and silu(m.activation))
    if not fused:
        log_once(
            f"accelerate: the activation {type(m.activation).__name__} is transformers', not fused"
        )
    # transformers 4 names no scale
    scale = (
        getattr(core, "scaling", size**-0.5) if layout.scale is None else layout.scale(core, size)
    )
    # an adapter's projection has its own shape
    heads = getattr(m.query, "out_features", 0) // size
    kv_heads = getattr(m.key, "out_features", 0) // size
    if m.fused is not None:
        heads = kv_heads = getattr(m.fused, "out_features", size) // (3 * size)
    name = m.activation if activation is None else activation_name(activation)
    first, last = m.attention_norm, m.output_norm
    rms = type(first) not in NORMS and rms_norm(first)
    return LayerSettings(
        heads,
        "silu" if activation is None and fused else name,
        getattr(first, "eps" if type(first) in NORMS else "variance_epsilon", 0.0),
        getattr(last, "eps" if type(last) in NORMS else "variance_epsilon", 0.0),
        rates(m),
        scale,
        pre_norm=layout.pre_norm,
        inner_site=m.inner_dropout is not None,
        gated=layout.gated,
        kv_heads=None if kv_heads in (0, heads) else kv_heads,
        rms_norm=rms,
    )
