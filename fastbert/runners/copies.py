"""Prepacked copies of an encoder's weights, and the native call that runs all layers on them."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastbert.backend import cpu
from fastbert.backend._common import stale
from fastbert.backend.cpu import _gemm
from fastbert.nn import int8
from fastbert.nn.int8 import Int8Linear
from fastbert.nn.int8_checks import why_not_exact
from fastbert.nn.layer import GELUS, LayerSettings, LayerWeights
from fastbert.nn.packing import Packing
from fastbert.nn.watch import log_once
from fastbert.ops._check import cu_seqlens_valid

# a layer's parameters by the fields of LayerWeights; the tensors of a field lie one below the other in its copy. An
# int8 weight is alone in its field
Fields = Sequence[Sequence[Tensor | Int8Linear]]

# why the layers have to run one by one
RECORDED = "gradients are recorded, call it under torch.no_grad() or torch.inference_mode()"

# Writes that PyTorch does not count are found by checksums of the packed weights. A call reads one number of every
# SAMPLED-th row, from another row on than the call before it. That finds a write to whole weights, such as those of
# moving averages, at once, and a write to a row within SAMPLED calls. A call of WHOLE_FROM tokens or more reads all
# numbers. docs/cpu.md has the costs.
SAMPLED = 8
WHOLE_FROM = 1024

# all Copies that hold a copy
_live: weakref.WeakSet[Copies] = weakref.WeakSet()

if cpu.native is not None and LayerWeights._fields != cpu.native.LAYER_FIELDS:
    raise stale(cpu.native, "it reads a layer's parameters in another order")


class Copies:
    """An encoder's prepacked weights for each dtype of the activations, and what they were made from.

    With `bits` the weights are int8, and activations are quantised to so many bits.
    """

    def __init__(self, bits: int | None = None) -> None:
        self.bits = bits
        # {dtype: (addresses (n, 12), copies)}
        self._packs: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = {}
        # (n, 4) int64 and (n, 3) fp32 in the order of csrc/cpu/encoder.h
        self._settings: tuple[Tensor, Tensor] | None = None
        # the packed weights' memory, its checksum, and those of the sampled rows by the first row
        self._seal: tuple[Tensor, int, list[int]] | None = None
        self._calls = 0

    def __deepcopy__(self, memo: Any) -> Copies:
        return type(self)(self.bits)

    def __reduce__(self) -> Any:
        return type(self), (self.bits,)

    def nbytes(self) -> int:
        """Bytes of the copies, of every dtype."""
        return sum(t.nbytes for _, kept in self._packs.values() for t in kept)

    def drop(self) -> None:
        """Forget the copies; the next forward makes them again."""
        self._packs.clear()
        self._seal = None
        _live.discard(self)

    def say_unused(self, reason: str) -> None:
        """Log why the layers run one by one; a warning if they compute in floating point though they were quantised."""
        if self.bits is None:
            log_once(f"the frozen encoder runs its layers one by one: {reason}")
        else:
            log_once(f"the quantised encoder computes in floating point: {reason}", logging.WARNING)

    def made_from(self, ids: set[int]) -> bool:
        """Whether a parameter with one of these ids was packed."""
        return any(id(p) in ids for p in self.sources())

    def sources(self) -> Sequence[Tensor]:
        """The parameters that were packed."""
        raise NotImplementedError

    def written(self, tokens: int) -> bool:
        """Whether numbers have changed since they were packed, as far as a call on so many tokens looks.

        The caller has checked that the parameters still lie at the same addresses.
        """
        seal = self._seal  # read once: another thread may pack or drop
        if seal is None:
            return False
        blocks, whole, sampled = seal
        if tokens >= WHOLE_FROM:
            return _checksum(blocks) != whole
        self._calls = first = (self._calls + 1) % SAMPLED
        return _checksum(blocks, first, SAMPLED) != sampled[first]

    def pack(
        self, dtype: torch.dtype, layers: Sequence[Fields], settings: Sequence[LayerSettings]
    ) -> None:
        """Copy every layer's weights for activations of this dtype."""
        if self._seal is None:
            numbers = [_block(t) for t in self.sources() if t.numel()]
            blocks = torch.tensor(numbers, dtype=torch.int64)
            sampled = [_checksum(blocks, first, SAMPLED) for first in range(SAMPLED)]
            self._seal = blocks, _checksum(blocks), sampled
        kept: list[Tensor] = []
        rows: list[list[int]] = []
        for i, fields in enumerate(layers):
            packed = [
                self._prepacked(f, dtype, f"the weight {name} of layer {i}")
                if len(f[0].shape) == 2
                else _joined(f)
                for name, f in zip(LayerWeights._fields, fields, strict=True)
            ]
            rows.append([cpu.address(t) for t in packed])
            # fp32 biases and norms are read where they are, and int8 modules pack their own weights
            kept += [
                t
                for t, f in zip(packed, fields, strict=True)
                if t is not f[0] and not isinstance(f[0], Int8Linear)
            ]
        # before the packs: another thread may run as soon as it finds those
        self._settings = _settings_tables(layers, settings)
        self._packs[dtype] = torch.tensor(rows, dtype=torch.int64), kept
        # not in `freeze`: deep copies and unpickled models are packed without a call of it
        _live.add(self)
        _watch_optimizers()

    def _prepacked(self, weights: Sequence[Any], dtype: torch.dtype, name: str) -> Tensor:
        if not weights[0].shape.numel():
            # the native call does not read the matrices of a block without heads or columns
            return torch.empty(0)
        if isinstance(weights[0], Int8Linear):
            return weights[0].packed()
        if self.bits is None:
            return _packed(weights, dtype)
        return int8.pack(*int8.split(torch.cat([w.detach() for w in weights]), name), self.bits)

    def run(
        self,
        x: Tensor,  # (T, C)
        packing: Packing,
        rows: Tensor | None,  # (R,) int64
    ) -> Tensor:
        """The last layer's output (T, C), or (R, C) at `rows`."""
        assert self._settings is not None
        table, _ = self._packs[x.dtype]
        sizes, numbers = self._settings
        T, C = x.shape
        count = T if rows is None else rows.shape[0]
        x, y = x.contiguous(), x.new_empty(count, C)
        cu_seqlens, rows = packing.cu_seqlens.contiguous(), cpu.int64(rows)
        cu_seqlens_valid(cu_seqlens, T, packing.max_seqlen)
        cpu.native.encoder_infer(
            cpu.DTYPES[x.dtype],
            self.bits is not None,
            x.data_ptr(),
            cu_seqlens.data_ptr(),
            table.data_ptr(),
            sizes.data_ptr(),
            numbers.data_ptr(),
            table.shape[0],
            cpu.address(rows),
            0 if rows is None else count,
            y.data_ptr(),
            T,
            cu_seqlens.shape[0] - 1,
            C,
            torch.get_num_threads(),
        )
        return y


def _block(t: Tensor) -> tuple[int, int, int]:
    """A parameter's memory: address, rows, bytes of a row."""
    if not t.is_contiguous():
        storage = t.untyped_storage()
        return storage.data_ptr(), 1, storage.nbytes()
    rows = t.shape[0] if t.dim() == 2 else 1
    return t.data_ptr(), rows, t.nbytes // max(rows, 1)


def _checksum(blocks: Tensor, first: int = 0, step: int = 0) -> int:
    threads = torch.get_num_threads()
    return cpu.native.checksum(blocks.data_ptr(), blocks.shape[0], first, step, threads)


def why_not_prepacked(
    fields: Fields | None, settings: LayerSettings, bits: int | None = None
) -> str | None:
    """Why the native call can't run a layer of these parameters and settings, None if it can.

    `bits` are those of quantised activations, None for floating-point products.
    """
    if settings.gated:
        return "its feed-forward has a gate"
    if settings.activation not in GELUS:
        return "the activation is not GELU"
    if settings.pre_norm or settings.gated or settings.rms_norm:
        return "the layer is not BERT's: its norms stand before the blocks, or its feed-forward is gated"
    if settings.window is not None or settings.kv_heads is not None:
        return "attention has a window, or shared key heads"
    if fields is None:
        return "a Linear or a norm is not torch.nn's own, or has no bias"
    for name, field in zip(LayerWeights._fields, fields, strict=True):
        label = name if name.endswith("bias") else f"{name}.weight"
        for t in field:
            if isinstance(t, Int8Linear):
                if reason := _why_not_these_integers(label, t, bits):
                    return reason
            elif reason := cpu.unsupported_parameter(label, t):
                return reason
    sizes = LayerWeights(*(tuple(f[0].shape) for f in fields))
    pieces = len(fields[0])
    if len(sizes.qkv) != 2 or len(sizes.up) != 2:
        return f"its weights have shapes {sizes.qkv} and {sizes.up}, not those of matrices"
    C, A, F = sizes.qkv[1], sizes.qkv[0] * pieces // 3, sizes.up[0]
    wanted = LayerWeights.shapes(C, A, F)
    if pieces == 3:
        wanted = wanted._replace(qkv=(A, C), qkv_bias=(A,))
    for name, field, size in zip(LayerWeights._fields, fields, wanted, strict=True):
        for t in field:
            if tuple(t.shape) != size:
                return f"its {name} has shape {tuple(t.shape)}, not {size}"
    if A % max(settings.heads, 1):
        return f"{A} columns are not {settings.heads} heads"
    return None if bits is None else why_not_exact(max(C, A, F), bits)


def _why_not_these_integers(label: str, m: Int8Linear, bits: int | None) -> str | None:
    if bits is None:
        return f"{label} is int8, call fastbert.quantize"
    return f"{label} is on {m.scale.device}" if m.scale.device.type != "cpu" else None


def _settings_tables(
    layers: Sequence[Fields], settings: Sequence[LayerSettings]
) -> tuple[Tensor, Tensor]:
    sizes, numbers = [], []
    for layer, s in zip(layers, settings, strict=True):
        w = LayerWeights(*layer)
        head = w.out[0].shape[1] // max(s.heads, 1)
        sizes.append([s.heads, head, w.up[0].shape[0], int(s.activation == "gelu_tanh")])
        scale = max(head, 1) ** -0.5 if s.scale is None else s.scale
        numbers.append([s.attention_eps, s.output_eps, scale])
    return torch.tensor(sizes, dtype=torch.int64), torch.tensor(numbers, dtype=torch.float32)


def _packed(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One weight or three, one below the other, (N, K) in the GEMM's own order, for inputs of this dtype."""
    (first, second, third), rows, N = _gemm.stacked([w.detach() for w in weights])
    K, kind = first.shape[1], cpu.DTYPES[dtype]
    packed = cpu.fresh(first, cpu.native.linear_packed_size(kind, N, K), dtype=torch.float32)
    cpu.native.linear_pack(
        kind,
        cpu.DTYPES[first.dtype],
        first.data_ptr(),
        second.data_ptr(),
        third.data_ptr(),
        rows,
        packed.data_ptr(),
        N,
        K,
        torch.get_num_threads(),
    )
    return packed


def _joined(vectors: Sequence[Any]) -> Tensor:
    """Biases side by side in fp32; a single one that is fp32 itself."""
    whole = vectors[0] if len(vectors) == 1 else torch.cat([v.detach().float() for v in vectors])
    return cpu.fp32(whole)


@functools.cache
def _watch_optimizers() -> None:
    """Drop the copies of weights that an optimiser steps: fused AdamW leaves their version counters unchanged."""
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _live:
        return
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for frozen in [f for f in _live if f.made_from(ids)]:
        frozen.drop()
