"""freeze() for transformers' encoders: prepacked copies of the weights, all layers in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.backend import chooser, cpu
from fastbert.integrations import disentangled, layers
from fastbert.integrations.families import Parts
from fastbert.nn.layer import LayerSettings, LayerWeights, parameters
from fastbert.nn.watch import log_once
from fastbert.ops.context import autocast
from fastbert.runners import forms
from fastbert.runners.copies import RECORDED, Copies, Fields, why_not_form, why_not_prepacked
from fastbert.runners.forms import Form


def served(encoder: nn.Module, x: Tensor, call: layers.Call) -> Tensor | None:
    """A frozen encoder's output for packed hidden states (1, T, C), None where its layers have to run."""
    copies = vars(encoder).get("frozen")
    if copies is None:
        return None
    if call.family.disentangled and (reason := _why_not_disentangled(encoder, call.parts)):
        copies.say_unused(reason)
        return None
    if call.tokens is not None or not (call.packed and call.states_unused):
        asked = "hidden states" if call.observer is None else "attention weights"
        reason = "padding is computed too" if call.states_unused else f"{asked} are requested"
        copies.say_unused(reason)
        return None
    y = copies.encode(call.parts, x[0], call)
    return None if y is None else y[None]


def served_by(call: layers.Call, number: int, x: Tensor) -> Tensor | None:
    """The output of one layer of a frozen model that calls its layers itself; None where the layer has to run.

    The first layer returns the output of the last, which the native call computes. Every other layer returns its input.
    """
    whole = call.whole
    if whole is None:
        return None
    if number == 0:
        y = served(whole.model, x, call)
        whole.served = y is not None
        return y
    return x if whole.served else None


def _why_not_disentangled(encoder: Any, parts: Sequence[Parts]) -> str | None:
    """Why the native call can't run DeBERTa's encoder with layers of these parts, None if it can."""
    if any(disentangled.terms(m.core) for m in parts):
        return "its attention is disentangled, with terms of content and position"
    if any(disentangled.by_head(m.core) for m in parts):
        return "the rows of its one projection are by head"
    if encoder._modules.get(encoder.fastbert_family.behind_first) is not None:
        return "a convolution stands behind its first layer"
    return None


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

    def why_not_form(self, encoder: Any) -> str | None:
        """Why the native call has no layer like those of an encoder, None if it has them all."""
        family = encoder.fastbert_family
        stacked = family.layers_of(encoder)
        parts = [family.layout.of(layer) for layer in stacked]
        if family.disentangled and (reason := _why_not_disentangled(encoder, parts)):
            return reason
        for i, (layer, m) in enumerate(zip(stacked, parts, strict=True)):
            reason = layers.why_not_packed(layer, m, family)
            if reason is None:
                fields = parameters(layers.prepacked_weights(m, family.layout))
                reason = why_not_form(fields, layers.settings(m, family.layout), self.bits)
            if reason is not None:
                return f"layer {i}: {reason}"
        return None

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
        dtype = x.dtype
        x, layout = autocast(x), call.family.layout
        settings = [layers.settings(m, layout) for m in parts]
        fields = [parameters(layers.prepacked_weights(m, layout)) for m in parts]
        reason = cpu.unsupported_dtype("x", x) or _why_not_native(fields, settings, x, self.bits)
        reason = reason or _why_not_these_forms(call.forms, fields, settings)
        if reason is not None:
            self.say_unused(reason)
            return None
        self._remember(fields, settings, x.shape[0])  # type: ignore[arg-type]
        if x.dtype not in self._packs:
            self.pack(x.dtype, fields, settings)  # type: ignore[arg-type]
        # held until the call is over
        tables = forms.tables(call.forms)
        y = self.run(x, call.packing, call.rows, forms.addresses(tables))
        # the sums of pre-norm layers keep the dtype of the embeddings
        return y.to(dtype) if layout.pre_norm else y

    def _remember(
        self, fields: Sequence[Fields], settings: Sequence[LayerSettings], tokens: int
    ) -> None:
        """Drop the copies unless they are of these very tensors and settings and nothing was written since."""
        every: list[Any] = [t for layer in fields for field in layer for t in field]
        # those of a layer that is used several times once
        sources = list({id(t): t for t in every}.values())
        state = (
            cpu.native.isa(),
            settings,
            [*map(id, every)],
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


def _why_not_these_forms(
    given: Sequence[Form], fields: Sequence[Fields | None], settings: Sequence[LayerSettings]
) -> str | None:
    """Why the native call can't read a layer's tables; where they do not fit, the op `attention` raises the error."""
    for f, layer, s in zip(given, fields, settings, strict=False):
        head = LayerWeights(*layer or ()).out[0].shape[1] // max(s.heads, 1)
        if f.rotary is not None and 2 * f.rotary.table.shape[2] > head:
            return f"rotary positions turn more than the {head} elements of a head"
        if f.bias is not None and f.bias.shape[0] != s.heads:
            return f"its biases of relative positions are not of {s.heads} heads"
        if f.bias is not None and torch.is_grad_enabled() and f.bias.requires_grad:
            return RECORDED
    return None


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
