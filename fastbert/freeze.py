"""Packed weights for inference on the CPU: the encoder's layers run in one native call, explicitly frozen only.

A packed copy can't see every change of the weight it was made from, so nothing is packed unless `freeze` says that the
weights stay as they are, and the copies go as soon as a change can be seen: another module, parameter, setting or
address, an optimiser's step, an in-place write that bumps the version counter.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastbert import backend, cpu
from fastbert.blocks import EncoderLayer, FeedForward, QKVProjection, SelfAttention, log_once
from fastbert.blocks import Linear as BlockLinear
from fastbert.cpu import _gemm
from fastbert.ops._check import cu_seqlens_valid
from fastbert.packing import Packing

if TYPE_CHECKING:
    from fastbert.bert import BertModel
    from fastbert.config import BertConfig

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
# why layers have to run
RECORDED = "gradients are recorded, call it under torch.no_grad() or torch.inference_mode()"
# those that hold copies
_live: weakref.WeakSet[Copies] = weakref.WeakSet()


def freeze(model: nn.Module) -> nn.Module:
    """Use packed copies of the encoder's weights in inference (CPU, no gradient); returns the model in eval mode.

    Takes fastbert.bert's models, and transformers' after fastbert.accelerate; raises TypeError for others. The copies
    are made at the first forward under torch.no_grad() or torch.inference_mode(), or of a model without trainable
    weights, once per dtype of the activations (fp32, or bf16 under autocast), in addition to the weights:
    `frozen_bytes` tells their size. They are made again when a weight was written to, loaded, moved, replaced or
    stepped by an optimiser. Writes that PyTorch does not count (`.data`, numpy, memory shared with another process)
    are not seen: call `freeze` again after them.
    """
    copies = [(m, _copies_of(m)) for m in model.modules()]
    if all(empty is None for _, empty in copies):
        raise TypeError(
            f"{type(model).__name__} has no fastbert encoder: pass a fastbert.bert model, or an accelerated one"
        )
    for m, empty in copies:
        if empty is not None:
            m.frozen = empty  # type: ignore[assignment]
    return model.eval()


def unfreeze(model: nn.Module) -> nn.Module:
    """Drop the packed copies that `freeze` made; returns the model."""
    for m in model.modules():
        if vars(m).get("frozen") is not None:
            m.frozen = None  # type: ignore[assignment]
    return model


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of all packed copies in the model, over and above its weights."""
    found = (vars(m).get("frozen") for m in model.modules())
    return sum(copies.nbytes() for copies in found if isinstance(copies, Copies))


def _copies_of(m: nn.Module) -> Copies | None:
    """New, empty copies for an encoder, None for any other module."""
    from fastbert.bert import BertModel
    from fastbert.integrations.frozen import FrozenLayers

    if isinstance(m, BertModel):
        return Frozen()
    family = getattr(type(m), "fastbert_family", None)
    if family is not None and family.kind(type(m).__name__) == "encoder":
        return FrozenLayers()
    return None


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


class Copies:
    """An encoder's packed copies, {dtype: table of addresses and the copies behind them}."""

    def __init__(self) -> None:
        self._packs: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = {}

    def __deepcopy__(self, memo: Any) -> Copies:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()

    def nbytes(self) -> int:
        """Bytes of the copies, of every dtype."""
        return sum(t.nbytes for _, kept in self._packs.values() for t in kept)

    def drop(self) -> None:
        """Forget the copies; the next forward makes them again."""
        self._packs.clear()
        _live.discard(self)

    def made_from(self, ids: set[int]) -> bool:
        """Whether a parameter with one of these ids was packed."""
        return any(id(p) in ids for p in self.sources())

    def sources(self) -> Sequence[Tensor]:
        """The parameters that were packed."""
        raise NotImplementedError

    def pack(self, dtype: torch.dtype, layers: Iterable[Sequence[Sequence[Tensor]]]) -> None:
        """Copy every layer's fields, in the order of encoder.h's Layer; pieces of one lie one below the other."""
        kept: list[Tensor] = []
        rows: list[list[int]] = []
        for fields in layers:
            packed = [_packed(f, dtype) if f[0].dim() == 2 else _joined(f) for f in fields]
            rows.append([cpu.address(t) for t in packed])
            # fp32 biases and norms are read where they are
            kept += [t for t, f in zip(packed, fields, strict=True) if t is not f[0]]
        self._packs[dtype] = torch.tensor(rows, dtype=torch.int64), kept
        # here, not in `freeze`: deep copies and unpickled models come by as well
        _live.add(self)
        _watch_optimizers()

    def run(
        self,
        x: Tensor,  # (T, C)
        packing: Packing,
        rows: Tensor | None,  # (R,) int64
        shape: Shape,
    ) -> Tensor:
        """The last layer's output (T, C), or (R, C) at `rows`."""
        table, _ = self._packs[x.dtype]
        T, C = x.shape
        count = T if rows is None else rows.shape[0]
        x, y = x.contiguous(), x.new_empty(count, C)
        cu_seqlens, rows = packing.cu_seqlens.contiguous(), cpu.int64(rows)
        cu_seqlens_valid(cu_seqlens, T, packing.max_seqlen)
        cpu.native.encoder_infer(  # type: ignore[union-attr]
            cpu.DTYPES[x.dtype],
            x.data_ptr(),
            cu_seqlens.data_ptr(),
            table.data_ptr(),
            table.shape[0],
            cpu.address(rows),
            0 if rows is None else count,
            y.data_ptr(),
            T,
            cu_seqlens.shape[0] - 1,
            shape.heads,
            C // shape.heads,
            shape.intermediate_size,
            shape.eps,
            shape.approximate == "tanh",
            torch.get_num_threads(),
        )
        return y


class Shape(NamedTuple):
    """What the native call is told of all layers beside their weights."""

    heads: int
    intermediate_size: int
    eps: float
    approximate: str | None


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
        if backend.forced() not in (None, "cpu") or x.numel() == 0:
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


def _packed(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One weight or three, one below the other, (N, K) in the GEMM's own order, for inputs of this dtype."""
    assert cpu.native is not None
    (first, *others), rows, N = _gemm.stacked([w.detach() for w in weights])
    K, kind = first.shape[1], cpu.DTYPES[dtype]
    packed = cpu.fresh(first, cpu.native.linear_packed_size(kind, N, K), dtype=torch.float32)
    cpu.native.linear_pack(
        kind,
        cpu.DTYPES[first.dtype],
        *(w.data_ptr() for w in (first, *others)),
        rows,
        packed.data_ptr(),
        N,
        K,
        torch.get_num_threads(),
    )
    return packed


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    """Biases side by side in fp32; a single one that is fp32 itself."""
    whole = vectors[0] if len(vectors) == 1 else torch.cat([v.detach().float() for v in vectors])
    return cpu.fp32(whole)  # type: ignore[return-value]


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


@functools.cache
def _watch_optimizers() -> None:
    """Drop the copies of weights that an optimiser steps: fused AdamW does not bump their version counters."""
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _live:
        return
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for frozen in [f for f in _live if f.made_from(ids)]:
        frozen.drop()
