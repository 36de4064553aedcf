"""fastbert.freeze for transformers' encoders: the packed path with copies of the weights, in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.backend import chooser, cpu
from fastbert.integrations import layers
from fastbert.integrations.families import Parts
from fastbert.nn.watch import log_once
from fastbert.ops.context import autocast
from fastbert.runners.copies import RECORDED, Copies, Shape

# a layer's Linears and norms behind query, key and value, in the order of encoder.h's Layer
_ORDER = ("out", "attention_norm", "up", "down", "output_norm")


def served(encoder: nn.Module, x: Tensor, call: layers.Call) -> Tensor | None:
    """What a frozen encoder makes of packed hidden states (1, T, C); None where its layers have to run."""
    copies = vars(encoder).get("frozen")
    if copies is None or not (call.packed and call.alone):
        return None
    y = copies.encode(call.parts, x[0], call)
    return None if y is None else y[None]


class FrozenLayers(Copies):
    """The copies of an accelerated encoder's layers."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: list[Tensor] = []
        self._state: tuple[object, ...] = ()

    def sources(self) -> Sequence[Tensor]:
        """The parameters that were packed."""
        return self._sources

    def drop(self) -> None:
        """Forget the copies and what they were made from."""
        super().drop()
        self._sources, self._state = [], ()

    def encode(self, parts: Sequence[Parts], x: Tensor, call: layers.Call) -> Tensor | None:
        """What the last of these layers makes of x (T, C), at call.rows where they are given; None if it can't be here.

        That every layer runs on packed tokens was found before.
        """
        if torch.compiler.is_compiling() or any(_trains(m) for m in parts):
            return None
        if x.device.type != "cpu" or chooser.forced() not in (None, "cpu") or x.numel() == 0:
            self.drop()
            return None
        x = autocast(x)
        shape, reason = _shape(parts)
        fields = [_fields(m) for m in parts]
        if torch.is_grad_enabled() and x.requires_grad:
            reason = RECORDED
        reason = reason or cpu.unsupported_dtype("x", x) or _unusual(fields, shape, x)
        if reason is not None or shape is None:
            log_once(f"the frozen encoder runs its layers one by one: {reason}")
            return None
        self._remember(fields)
        if x.dtype not in self._packs:
            self.pack(x.dtype, fields)  # type: ignore[arg-type]
        return self.run(x, call.packing, call.rows, shape)

    def _remember(self, fields: Sequence[Any]) -> None:
        """Drop the copies unless they are of these very tensors, in which nothing was written since."""
        sources = [t for layer in fields for field in layer for t in field]
        state = (
            cpu.native.isa(),  # type: ignore[union-attr]
            [*map(id, sources)],
            [t._version for t in sources],
            [*map(Tensor.data_ptr, sources)],
        )
        if state != self._state:
            if self._packs:
                log_once(
                    "the weights or parts of a frozen model have changed: they are packed again"
                )
            self.drop()
            # held, so that no id or address goes to something else in the meantime
            self._sources, self._state = sources, state


def _trains(m: Parts) -> bool:
    dropouts = (m.attention_dropout, m.out_dropout, m.down_dropout)
    return m.core.training or any(d is not None and d.training for d in dropouts)


def _fields(m: Parts) -> list[tuple[Tensor, ...]] | None:
    """Weight and bias of all projections together, then of every other part; None where one is not untouched."""
    three = [layers.plain(p) for p in (m.query, m.key, m.value)]
    found = [*zip(*three, strict=True)] if None not in three else []
    for name in _ORDER:
        part = getattr(m, name)
        pair = (part.weight, part.bias) if type(part) in layers.NORMS else layers.plain(part)
        if pair is None:
            return None
        found += [(t,) for t in pair]
    complete = len(found) == 12 and all(t is not None for field in found for t in field)
    return found if complete else None


def _shape(parts: Sequence[Parts]) -> tuple[Shape | None, str | None]:
    """What all layers have in common, or why the native call can't run them."""
    shapes = set()
    for m in parts:
        size = m.core.attention_head_size
        if getattr(m.core, "scaling", size**-0.5) != size**-0.5:
            return None, f"scores are scaled by {m.core.scaling}"
        approximate = layers.gelu(m.activation)
        if approximate is None:
            return None, "the activation is not GELU"
        for norm in (m.attention_norm, m.output_norm):
            if type(norm) not in layers.NORMS or len(norm.normalized_shape) != 1:
                return None, f"a norm is a {type(norm).__name__}"
            heads, inner = m.query.out_features // size, m.up.out_features
            shapes.add(Shape(heads, inner, norm.eps, approximate))
    if len(shapes) != 1:
        return None, "layers differ in sizes or settings"
    return shapes.pop(), None


def _unusual(fields: Sequence[Any], shape: Shape | None, x: Tensor) -> str | None:
    """Why these weights can't be packed for inputs like x (T, C)."""
    if any(layer is None for layer in fields) or shape is None:
        return "a Linear or a norm is not torch.nn's own, or has no bias"
    C, F = x.shape[1], shape.intermediate_size
    wanted = [(C, C), (C,), (C, C), (C,), (C,), (C,), (F, C), (F,), (C, F), (C,), (C,), (C,)]
    for layer in fields:
        for field, size in zip(layer, wanted, strict=True):
            for t in field:
                if tuple(t.shape) != size:
                    return f"a parameter has shape {tuple(t.shape)}, not {size}"
                if reason := _unfit(t):
                    return reason
    if C % shape.heads:
        return f"{C} columns are not {shape.heads} heads"
    return None


def _unfit(t: Tensor) -> str | None:
    if type(t) not in (nn.Parameter, Tensor):
        return f"a parameter is a {type(t).__name__}"
    if reason := cpu.unpackable("a parameter", t):
        return reason
    return RECORDED if torch.is_grad_enabled() and t.requires_grad else None
