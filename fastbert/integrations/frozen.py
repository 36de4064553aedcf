"""freeze() for transformers' encoders: prepacked copies of the weights, all layers in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.backend import chooser, cpu
from fastbert.integrations import layers
from fastbert.integrations.families import Parts
from fastbert.nn.layer import LayerSettings, parameters
from fastbert.nn.watch import log_once
from fastbert.ops.context import autocast
from fastbert.runners.copies import RECORDED, Copies, Fields, why_not_prepacked


def served(encoder: nn.Module, x: Tensor, call: layers.Call) -> Tensor | None:
    """A frozen encoder's output for packed hidden states (1, T, C), None where its layers have to run."""
    copies = vars(encoder).get("frozen")
    if copies is None:
        return None
    if call.forms:
        copies.say_unused("attention reads the distances of tokens")
        return None
    if call.tokens is not None or not (call.packed and call.states_unused):
        reason = "padding is computed too" if call.states_unused else "hidden states are requested"
        copies.say_unused(reason)
        return None
    y = copies.encode(call.parts, x[0], call)
    return None if y is None else y[None]


class FrozenLayers(Copies):
    """The copies of an accelerated encoder's layers."""

    def __init__(self, bits: int | None = None) -> None:
        super().__init__(bits)
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
        """The last layer's output for x (T, C), at call.rows where given; None where the layers have to run.

        The caller has checked that every layer runs on packed tokens.
        """
        if torch.compiler.is_compiling() or any(_trains(m) for m in parts):
            return None
        if x.device.type != "cpu":
            # the weights have moved to another device: the copies serve no more
            self.drop()
            return None
        if not chooser.permits(cpu) or x.numel() == 0:
            return None
        x, layout = autocast(x), call.family.layout
        settings = [layers.settings(m, layout) for m in parts]
        fields = [parameters(layers.weights(m, layout)) for m in parts]
        reason = cpu.unsupported_dtype("x", x) or _why_not_native(fields, settings, x, self.bits)
        if reason is not None:
            self.say_unused(reason)
            return None
        self._remember(fields, settings, x.shape[0])  # type: ignore[arg-type]
        if x.dtype not in self._packs:
            self.pack(x.dtype, fields, settings)  # type: ignore[arg-type]
        return self.run(x, call.packing, call.rows)

    def _remember(
        self, fields: Sequence[Fields], settings: Sequence[LayerSettings], tokens: int
    ) -> None:
        """Drop the copies unless they are of these very tensors and settings and nothing was written since."""
        sources: list[Any] = [t for layer in fields for field in layer for t in field]
        state = (
            cpu.native.isa(),
            settings,
            [*map(id, sources)],
            [t._version for t in sources],
            [*map(Tensor.data_ptr, sources)],
        )
        if state != self._state or self.written(tokens):
            if self._packs:
                log_once(
                    "the weights or parts of a frozen model have changed: they are packed again"
                )
            self.drop()
            # held, so that no id or address goes to something else in the meantime
            self._sources, self._state = sources, state


def _trains(m: Parts) -> bool:
    dropouts = (m.attention_dropout, m.out_dropout, m.inner_dropout, m.down_dropout)
    return m.core.training or any(getattr(d, "training", False) for d in dropouts)


def _why_not_native(
    fields: Sequence[Fields | None],
    settings: Sequence[LayerSettings],
    x: Tensor,
    bits: int | None,
) -> str | None:
    """Why the layers have to run one by one on inputs like x (T, C), None if one native call can run them."""
    if torch.is_grad_enabled() and x.requires_grad:
        return RECORDED
    for layer, s in zip(fields, settings, strict=True):
        if reason := why_not_prepacked(layer, s, bits):
            return reason
        assert layer is not None
        if layer[0][0].shape[1] != x.shape[1]:
            return f"the hidden states are {x.shape[1]} wide"
        for t in (t for field in layer for t in field):
            if type(t) not in (nn.Parameter, Tensor):
                return f"a parameter is a {type(t).__name__}"
            if torch.is_grad_enabled() and t.requires_grad:
                return RECORDED
    return None
