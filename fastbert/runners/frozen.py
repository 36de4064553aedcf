"""Prepacked copies of the weights of a fastbert.bert encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbert.backend import chooser, cpu
from fastbert.backend.reference.attention_form import Rotary
from fastbert.backend.torch_private import exporting
from fastbert.nn.base import Linear as BlockLinear
from fastbert.nn.blocks import PARAMETERS, EncoderLayer, QKVProjection, SelfAttention
from fastbert.nn.feed_forward import FeedForward, GatedFeedForward
from fastbert.nn.int8 import Int8Linear
from fastbert.nn.layer import LayerSettings, activation_name
from fastbert.nn.packing import Packing
from fastbert.nn.recurrent import LSTMLayer
from fastbert.nn.watch import log_once
from fastbert.runners.copies import (
    RECORDED,
    Copies,
    Fields,
    why_not_form,
    why_not_prepacked,
)
from fastbert.runners.forms import Form, addresses, tables

# the classes that each part of a layer may have for its parameters to be read
PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "": (EncoderLayer,),
    "attention": (SelfAttention,),
    "attention.qkv": (QKVProjection, Int8Linear),
    "attention.out": (BlockLinear, Int8Linear),
    "attention_norm": (nn.LayerNorm, nn.Identity),
    "feed_forward": (FeedForward, GatedFeedForward),
    "feed_forward.up": (BlockLinear, Int8Linear),
    "feed_forward.down": (BlockLinear, Int8Linear),
    "output_norm": (nn.LayerNorm,),
}


# a part's attribute that the native code is passed
SETTINGS: dict[type[nn.Module], str] = {
    nn.LayerNorm: "eps",
    QKVProjection: "num_heads",
    Int8Linear: "num_heads",
    FeedForward: "approximate",
    GatedFeedForward: "activation",
    SelfAttention: "window",
    EncoderLayer: "pre_norm",
}


class Encoder(Protocol):
    """What is read of a fastbert.bert encoder."""

    layers: nn.ModuleList
    training: bool


class Origin:
    """The modules and parameters that were copied.

    They are held: an id or an address that is compared later can't have gone to another object.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.layers = encoder.layers
        self.parts = [m for layer in self.layers for m in layer.modules()]
        self.parameters = [p for layer in self.layers for p in layer.parameters()]
        self.memory = [p.detach() for p in self.parameters]
        # of int8 modules, which have packed their weights
        self.buffers = [b for layer in self.layers for b in layer.buffers()]
        self.inside = [vars(m) for m in self.parts]
        # the dicts in which a forward looks up its parts, parameters and buffers
        kinds = ("_modules", "_parameters", "_buffers")
        places = [d[kind] for d in self.inside for kind in kinds]
        self.places = [(place, name) for place in places for name in place]
        self.settings = [(vars(m), SETTINGS[type(m)]) for m in self.parts if type(m) in SETTINGS]
        self.state = self.look()

    def unchanged(self, encoder: Encoder) -> bool:
        """Whether the encoder's layers still consist of what was packed, and run the same code."""
        return encoder.layers is self.layers and self.look() == self.state

    def look(self) -> tuple[object, ...]:
        """Everything that the copies and the native call depend on; flat, because every forward compares it."""
        return (
            cpu.native.isa(),
            [d.get(name) for d, name in self.settings],
            [id(m) for m in self.layers._modules.values()],
            [id(place.get(name)) for place, name in self.places],
            [*map(type, self.parts)],
            # parts that run other code than their class's: there must be none
            [
                d
                for d in self.inside
                if d["training"] or d["_forward_hooks"] or d["_forward_pre_hooks"] or "forward" in d
            ],
            [p._version for p in self.parameters],
            [*map(Tensor.data_ptr, self.parameters)],
        )


class Frozen(Copies):
    """The copies of a fastbert.bert encoder."""

    def __init__(self, bits: int | None = None) -> None:
        super().__init__(bits)
        self._origin: Origin | None = None
        self._width = 0

    def drop(self) -> None:
        """Forget the copies and what they were made from."""
        super().drop()
        self._origin = None

    def sources(self) -> Sequence[Tensor]:
        """The parameters that were packed."""
        return () if self._origin is None else self._origin.parameters

    def why_not_form(self, encoder: Encoder) -> str | None:
        """Why the native call has no layer like those of an encoder, None if it has them all."""
        for i, layer in enumerate(encoder.layers):
            reason = why_not_read(layer, training=True)
            if reason is None and not any(isinstance(m, Int8Linear) for m in layer.modules()):
                reason = why_not_form(_fields(layer), _settings(layer), self.bits)  # type: ignore[arg-type]
            if reason is not None:
                return f"layer {i}: {reason}"
        return None

    def serves(self, encoder: Encoder, x: Tensor, last_alone: bool = True) -> bool:
        """Whether a forward on embeddings x (T, C) can run on the copies; makes them if they are missing.

        With `last_alone` only the last hidden states are wanted; the copies give no others, and no attentions.
        """
        if torch.compiler.is_compiling() or exporting() or encoder.training:
            return False
        if x.device.type != "cpu":
            # the weights have moved to another device: the copies serve no more
            self.drop()
            return False
        if not chooser.permits(cpu) or x.numel() == 0:
            return False
        if self._origin is not None and (
            not self._origin.unchanged(encoder) or self.written(x.shape[0])
        ):
            log_once("the weights or parts of a frozen model have changed: they are packed again")
            self.drop()
        reason = self._recorded(encoder, x)
        if not last_alone:
            reason = "hidden states or attentions are requested"
        if reason is None and x.dtype not in self._packs:
            reason = cpu.unsupported_dtype("x", x) or self._pack(encoder, x.dtype)
        if reason is None and x.shape[1] != self._width:
            reason = f"the embeddings are {x.shape[1]} wide"
        if reason is not None:
            self._say_unused(encoder, reason)
        return reason is None

    def _say_unused(self, encoder: Encoder, reason: str) -> None:
        # the layers of an int8 model compute in integers too
        if not any(isinstance(m, Int8Linear) for m in encoder.layers.modules()):
            self.say_unused(reason)

    def _recorded(self, encoder: Encoder, x: Tensor) -> str | None:
        """Why the layers are needed for gradients, or None."""
        if not torch.is_grad_enabled():
            return None
        parameters = (
            encoder.layers.parameters() if self._origin is None else self._origin.parameters
        )
        if x.requires_grad or any(p.requires_grad for p in parameters):
            return RECORDED
        return None

    def _pack(self, encoder: Encoder, dtype: torch.dtype) -> str | None:
        """Pack the weights for activations of this dtype, or say why the layers can't be read instead of called."""
        if type(encoder.layers) is not nn.ModuleList or len(encoder.layers) == 0:
            return "it has no list of layers, or an empty one"
        layers, settings = [], []
        for layer in encoder.layers:
            if reason := why_not_read(layer):
                return reason
            s = _settings(layer)  # type: ignore[arg-type]
            fields = _fields(layer)
            if reason := why_not_prepacked(fields, s, self.bits):
                return reason
            assert fields is not None
            layers.append(fields)
            settings.append(s)
        if len({fields[0][0].shape[1] for fields in layers}) > 1:
            return "its layers differ in width"
        for part in (t for fields in layers for f in fields for t in f):
            if isinstance(part, Int8Linear) and part.shape.numel():
                # its weight moves, which is no change of the encoder
                part.packed()
        if self._origin is None:
            self._origin = Origin(encoder)
        self._width = layers[0][0][0].shape[1]
        self.pack(dtype, layers, settings)
        return None

    def encode(
        self,
        encoder: Encoder,
        x: Tensor,  # (T, C)
        packing: Packing,
        rows: Tensor | None,  # (R,) int64
        rotary: Sequence[Rotary | None],  # of every layer
        held: Tensor
        | None = None,  # (B, 3) int64: keys and values that are kept, of a causal encoder
    ) -> Tensor:
        """The last layer's output (T, C), or (R, C) at `rows`."""
        windows = [layer.attention.window for layer in encoder.layers]  # type: ignore[union-attr]
        forms = [Form(w, r) for w, r in zip(windows, rotary, strict=True)]  # type: ignore[arg-type]
        # held until the call is over
        found = tables(forms) if any(f != Form() for f in forms) else []
        return self.run(x, packing, rows, addresses(found), held)


def _fields(layer: nn.Module) -> Fields | None:
    """The layer's parameters in the order of LayerWeights, None where one is missing or has another name."""
    own: dict[str, Any] = dict(layer.named_parameters(remove_duplicate=False))
    own |= {
        f"{path}.weight": m
        for path, m in layer.named_modules(remove_duplicate=False)
        if isinstance(m, Int8Linear)
    }
    fields = [[own.pop(name)] if name in own else [] for name in PARAMETERS]
    return None if own else fields


def why_not_read(layer: nn.Module, training: bool = False) -> str | None:
    """Why a layer's parts must be called, None if their parameters say everything about them.

    With `training` the parts may be in training mode.
    """
    if isinstance(layer, LSTMLayer):
        return "it is an LSTM, which has no native layer"
    for path, m in layer.named_modules(remove_duplicate=False):
        kind = type(m).__name__
        if type(m) not in PARTS.get(path, ()):
            return f"a part of a layer is a {kind}"
        if m._forward_hooks or m._forward_pre_hooks:
            return f"hooks are attached to a {kind}"
        if "forward" in vars(m):
            return f"the forward of a {kind} was replaced"
        if m.training and not training:
            return f"a {kind} is in training mode, call eval() on the model"
    if _fields(layer) is None:
        return "a layer holds a parameter that is none of its weights and biases"
    return None


def _settings(layer: EncoderLayer) -> LayerSettings:
    block = layer.feed_forward
    gated = isinstance(block, GatedFeedForward)
    activation = block.activation if gated else activation_name(block.approximate)  # type: ignore[arg-type]
    return LayerSettings(
        layer.attention.qkv.num_heads,
        activation,
        getattr(layer.attention_norm, "eps", 0.0),
        getattr(layer.output_norm, "eps", 0.0),
        pre_norm=layer.pre_norm,
        gated=gated,
    )
