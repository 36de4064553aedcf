"""Prepacked copies of one of our own encoders' weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastbert.backend import chooser, cpu
from fastbert.models.config import BertConfig
from fastbert.models.encoder import BertModel
from fastbert.nn.blocks import EncoderLayer, FeedForward, QKVProjection, SelfAttention
from fastbert.nn.blocks import Linear as BlockLinear
from fastbert.nn.packing import Packing
from fastbert.nn.watch import log_once
from fastbert.runners.copies import RECORDED, Copies, Shape

# the parts of a layer that the native code knows, by name
PARTS: dict[str, type[nn.Module]] = {
    "": EncoderLayer,
    "attention": SelfAttention,
    "attention.qkv": QKVProjection,
    "attention.out": BlockLinear,
    "attention_norm": nn.LayerNorm,
    "feed_forward": FeedForward,
    "feed_forward.up": BlockLinear,
    "feed_forward.down": BlockLinear,
    "output_norm": nn.LayerNorm,
}


# a part's attribute and the configuration's, whose value is passed to the native code
SETTINGS: dict[type[nn.Module], tuple[str, str]] = {
    nn.LayerNorm: ("eps", "layer_norm_eps"),
    QKVProjection: ("num_heads", "num_attention_heads"),
    FeedForward: ("approximate", "approximate"),
}


class Origin:
    """What the copies were made from, held so that no id or address goes to something else in the meantime."""

    def __init__(self, encoder: BertModel) -> None:
        self.layers = encoder.layers
        self.parts = [m for layer in self.layers for m in layer.modules()]
        self.parameters = [p for layer in self.layers for p in layer.parameters()]
        self.memory = [p.detach() for p in self.parameters]
        self.inside = [vars(m) for m in self.parts]
        # where a forward finds the parts and parameters
        places = [d[kind] for d in self.inside for kind in ("_modules", "_parameters")]
        self.places = [(place, name) for place in places for name in place]
        self.settings = [(vars(m), SETTINGS[type(m)][0]) for m in self.parts if type(m) in SETTINGS]
        self.state = self.look(encoder.config)

    def unchanged(self, encoder: BertModel) -> bool:
        """Whether the encoder's layers still consist of what was packed, and run the same code."""
        return encoder.layers is self.layers and self.look(encoder.config) == self.state

    def look(self, config: BertConfig) -> tuple[object, ...]:
        """All that the copies and the native call depend on; every forward compares it, so it is flat and cheap."""
        return (
            cpu.native.isa(),  # type: ignore[union-attr]
            config.hidden_size,
            config.intermediate_size,
            [getattr(config, name) for _, name in SETTINGS.values()],
            [d[name] for d, name in self.settings],
            [id(m) for m in self.layers._modules.values()],
            [id(place.get(name)) for place, name in self.places],
            [*map(type, self.parts)],
            # none: parts that run other code than their class's
            [
                d
                for d in self.inside
                if d["training"] or d["_forward_hooks"] or d["_forward_pre_hooks"] or "forward" in d
            ],
            [p._version for p in self.parameters],
            [*map(Tensor.data_ptr, self.parameters)],
        )


class Frozen(Copies):
    """The copies of one of our own encoders."""

    def __init__(self) -> None:
        super().__init__()
        self._origin: Origin | None = None

    def drop(self) -> None:
        """Forget the copies and what they were made from."""
        super().drop()
        self._origin = None

    def sources(self) -> Sequence[Tensor]:
        """The parameters that were packed."""
        return () if self._origin is None else self._origin.parameters

    def serves(self, encoder: BertModel, x: Tensor) -> bool:
        """Whether a forward on embeddings x (T, C) can run on packed copies; makes them if they are missing."""
        if torch.compiler.is_compiling() or encoder.training:
            return False
        if x.device.type != "cpu":
            # the weights have moved: their copies would stay for nothing
            self.drop()
            return False
        if chooser.forced() not in (None, "cpu") or x.numel() == 0:
            return False
        if self._origin is not None and not self._origin.unchanged(encoder):
            log_once("the weights or parts of a frozen model have changed: they are packed again")
            self.drop()
        reason = self._recorded(encoder, x)
        if reason is None and x.dtype not in self._packs:
            reason = cpu.unsupported_dtype("x", x) or _unusual(encoder)
            if reason is None:
                self._pack(encoder, x.dtype)
        if reason is None and x.shape[1] != encoder.config.hidden_size:
            reason = f"the embeddings are {x.shape[1]} wide"
        if reason is not None:
            log_once(f"the frozen encoder runs its layers one by one: {reason}")
        return reason is None

    def _recorded(self, encoder: BertModel, x: Tensor) -> str | None:
        """Why the layers are needed for gradients, or None."""
        if not torch.is_grad_enabled():
            return None
        parameters = (
            encoder.layers.parameters() if self._origin is None else self._origin.parameters
        )
        if x.requires_grad or any(p.requires_grad for p in parameters):
            return RECORDED
        return None

    def _pack(self, encoder: BertModel, dtype: torch.dtype) -> None:
        if self._origin is None:
            self._origin = Origin(encoder)
        layers = (dict(m.named_parameters(remove_duplicate=False)) for m in encoder.layers)
        names = _shapes(encoder.config)
        self.pack(dtype, ([[parameters[name]] for name in names] for parameters in layers))

    def encode(
        self,
        encoder: BertModel,
        x: Tensor,  # (T, C)
        packing: Packing,
        rows: Tensor | None,  # (R,) int64
    ) -> Tensor:
        """The last layer's output (T, C), or (R, C) at `rows`."""
        c = encoder.config
        shape = Shape(c.num_attention_heads, c.intermediate_size, c.layer_norm_eps, c.approximate)
        return self.run(x, packing, rows, shape)


def _unusual(encoder: BertModel) -> str | None:
    """Why the layers can't be read instead of called, or None: something in them is not as the configuration says."""
    if encoder.config.approximate is None:
        return "the activation is not GELU"
    if type(encoder.layers) is not nn.ModuleList or len(encoder.layers) == 0:
        return "it has no list of layers, or an empty one"
    reasons = (
        _unusual_parts(layer, encoder.config) or _unusual_weights(layer, encoder.config)
        for layer in encoder.layers
    )
    return next((reason for reason in reasons if reason is not None), None)


def _unusual_parts(layer: nn.Module, config: BertConfig) -> str | None:
    for path, m in layer.named_modules(remove_duplicate=False):
        kind = type(m).__name__
        if type(m) is not PARTS.get(path):
            return f"a part of a layer is a {kind}"
        if m._forward_hooks or m._forward_pre_hooks:
            return f"hooks are attached to a {kind}"
        if "forward" in vars(m):
            return f"the forward of a {kind} was replaced"
        if m.training:
            return f"a {kind} is in training mode, call eval() on the model"
        if type(m) in SETTINGS:
            name, configured = SETTINGS[type(m)]
            ours, theirs = getattr(m, name), getattr(config, configured)
            if ours != theirs:
                return f"{name} of a {kind} is {ours}, the configuration says {theirs}"
    return None


def _unusual_weights(layer: nn.Module, config: BertConfig) -> str | None:
    parameters = dict(layer.named_parameters(remove_duplicate=False))
    if {name: tuple(p.shape) for name, p in parameters.items()} != _shapes(config):
        return "a layer's weights do not have the names and shapes that the configuration asks for"
    return next(filter(None, (cpu.unpackable(name, p) for name, p in parameters.items())), None)


def _shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """A layer's parameters and their shapes, in the order of encoder.h's Layer."""
    C, F = config.hidden_size, config.intermediate_size
    weights = {
        "attention.qkv": (3 * C, C),
        "attention.out": (C, C),
        "attention_norm": (C,),
        "feed_forward.up": (F, C),
        "feed_forward.down": (C, F),
        "output_norm": (C,),
    }
    return {
        f"{part}.{name}": size
        for part, shape in weights.items()
        for name, size in (("weight", shape), ("bias", shape[:1]))
    }
