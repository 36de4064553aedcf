"""Packed weights for inference on the CPU: the encoder's layers run in one native call, explicitly frozen only.

A packed copy can't see every change of the weight it was made from, so nothing is packed unless `freeze` says that the
weights stay as they are, and the copies go as soon as a change can be seen: another module, parameter or address, an
optimiser's step, an in-place write that bumps the version counter.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastbert import backend, cpu
from fastbert.blocks import EncoderLayer, FeedForward, QKVProjection, SelfAttention, log_once
from fastbert.blocks import Linear as BlockLinear
from fastbert.ops._check import cu_seqlens_valid
from fastbert.packing import Packing

if TYPE_CHECKING:
    from fastbert.bert import BertModel

_live: weakref.WeakSet[BertModel] = weakref.WeakSet()


def freeze(model: nn.Module) -> nn.Module:
    """Use packed copies of the encoder's weights in inference (CPU, no gradient); returns the model in eval mode.

    The copies are made at the first forward, once per dtype of the activations (fp32, or bf16 under autocast), in
    addition to the weights: `frozen_bytes` tells their size. They are made again when a weight was written to, loaded,
    moved, replaced or stepped by an optimiser. Writes that PyTorch does not count (`.data`, memory shared with another
    process) are not seen: call `freeze` again after them.
    Raises TypeError for a model without a fastbert encoder.
    """
    for encoder in _encoders(model):
        encoder.frozen = Frozen()
        _live.add(encoder)
    _watch_optimizers()
    return model.eval()


def unfreeze(model: nn.Module) -> nn.Module:
    """Drop the packed copies that `freeze` made; returns the model."""
    for encoder in _encoders(model):
        encoder.frozen = None
    return model


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of all packed copies in the model, over and above its weights."""
    return sum(0 if e.frozen is None else e.frozen.nbytes() for e in _encoders(model))


def _encoders(model: nn.Module) -> list[BertModel]:
    from fastbert.bert import BertModel

    found = [m for m in model.modules() if isinstance(m, BertModel)]
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no fastbert encoder: freeze takes fastbert.bert models"
        )
    return found


class Frozen:
    """An encoder's packed copies, {dtype: table of addresses and the tensors behind them}."""

    def __init__(self) -> None:
        self._packs: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = {}
        # what the copies were made from, as it was: modules where they hang, parameters with version and address
        self._modules: list[tuple[dict[str, Any], str, nn.Module, type]] = []
        self._parameters: list[tuple[dict[str, Any], str, Tensor, int, int]] = []

    def __deepcopy__(self, memo: Any) -> Frozen:
        return Frozen()

    def __reduce__(self) -> Any:
        return Frozen, ()

    def nbytes(self) -> int:
        """Bytes of the copies, of every dtype."""
        return sum(t.nbytes for _, kept in self._packs.values() for t in kept)

    def drop(self) -> None:
        """Forget the copies; the next forward makes them again."""
        self._packs.clear()

    def serves(self, encoder: BertModel, x: Tensor) -> bool:
        """Whether a forward on embeddings x (T, C) can run on packed copies; makes them if they are missing."""
        if torch.is_grad_enabled() or encoder.training or torch.compiler.is_compiling():
            return False
        if x.device.type != "cpu" or backend.forced() not in (None, "cpu") or x.numel() == 0:
            return False
        if self._packs and not self._current():
            log_once("the weights or parts of a frozen model have changed: they are packed again")
            self.drop()
        if x.dtype not in self._packs:
            reason = cpu.unsupported_dtype("x", x) or _unusual(encoder)
            if reason is not None:
                log_once(f"the frozen encoder runs its layers one by one: {reason}")
                return False
            self._pack(encoder, x.dtype)
        return True

    def _current(self) -> bool:
        """Whether the encoder's layers still consist of what was packed."""
        for place, name, m, kind in self._modules:
            if place.get(name) is not m or type(m) is not kind:
                return False
            if m._forward_hooks or m._forward_pre_hooks:
                return False
        return all(
            place.get(name) is p and p._version == version and p.data_ptr() == address
            for place, name, p, version, address in self._parameters
        )

    def _pack(self, encoder: BertModel, dtype: torch.dtype) -> None:
        kept: list[Tensor] = []
        rows: list[list[int]] = []
        for layer in encoder.layers:
            fields = _fields(layer, dtype)  # type: ignore[arg-type]
            kept += [t for t in fields if t is not None]
            rows.append([cpu.address(t) for t in fields])
        self._packs[dtype] = torch.tensor(rows, dtype=torch.int64), kept
        inside = list(encoder.layers.modules())
        self._modules = [
            (m._modules, name, child, type(child))
            for m in inside
            for name, child in m._modules.items()
            if child is not None
        ]
        self._parameters = [
            (m._parameters, name, p, p._version, p.data_ptr())
            for m in inside
            for name, p in m._parameters.items()
            if p is not None
        ]

    def encode(
        self,
        encoder: BertModel,
        x: Tensor,  # (T, C)
        packing: Packing,
        rows: Tensor | None,  # (R,) int64
    ) -> Tensor:
        """The last layer's output (T, C), or (R, C) at `rows`."""
        table, _ = self._packs[x.dtype]
        config, (T, C) = encoder.config, x.shape
        count = T if rows is None else rows.shape[0]
        x, y = x.contiguous(), x.new_empty(count, C)
        cu_seqlens, rows = packing.cu_seqlens.contiguous(), cpu.int64(rows)
        cu_seqlens_valid(cu_seqlens, T, packing.max_seqlen)
        H = config.num_attention_heads
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
            H,
            C // H,
            config.intermediate_size,
            config.layer_norm_eps,
            config.approximate == "tanh",
            torch.get_num_threads(),
        )
        return y


def _fields(layer: EncoderLayer, dtype: torch.dtype) -> list[Tensor | None]:
    """What encoder.h's Layer points to, in its order."""
    attention, forward = layer.attention, layer.feed_forward
    fields: list[Tensor | None] = []
    for linear in (attention.qkv, attention.out):
        fields += [_packed(linear.weight, dtype), cpu.fp32(linear.bias)]
    fields += [cpu.fp32(layer.attention_norm.weight), cpu.fp32(layer.attention_norm.bias)]
    for linear in (forward.up, forward.down):
        fields += [_packed(linear.weight, dtype), cpu.fp32(linear.bias)]
    return [*fields, cpu.fp32(layer.output_norm.weight), cpu.fp32(layer.output_norm.bias)]


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in the GEMM's own order, for inputs of this dtype."""
    assert cpu.native is not None
    N, K = weight.shape
    weight, kind = weight.detach().contiguous(), cpu.DTYPES[dtype]
    packed = cpu.fresh(weight, cpu.native.linear_packed_size(kind, N, K), dtype=torch.float32)
    pieces = (weight.data_ptr(),) * 3
    cpu.native.linear_pack(
        kind,
        cpu.DTYPES[weight.dtype],
        *pieces,
        N,
        packed.data_ptr(),
        N,
        K,
        torch.get_num_threads(),
    )
    return packed


def _unusual(encoder: BertModel) -> str | None:
    """Why the layers can't be read instead of called: an activation, a replaced or hooked part."""
    if encoder.config.approximate is None:
        return "the activation is not GELU"
    expected = {EncoderLayer, SelfAttention, QKVProjection, BlockLinear, FeedForward, nn.LayerNorm}
    for layer in encoder.layers:
        for m in layer.modules():
            if type(m) not in expected:
                return f"a part of a layer is a {type(m).__name__}"
            if m._forward_hooks or m._forward_pre_hooks:
                return f"hooks are attached to a {type(m).__name__}"
    return None


_watching = False


def _watch_optimizers() -> None:
    """Drop the copies of weights that an optimiser steps: fused AdamW does not bump their version counters."""
    global _watching
    if _watching:
        return
    _watching = True

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        changed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for encoder in _live:
            if encoder.frozen is not None and any(id(p) in changed for p in encoder.parameters()):
                encoder.frozen.drop()

    register_optimizer_step_post_hook(stepped)
