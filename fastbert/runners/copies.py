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
from fastbert.backend.cpu.attention import MOST_D
from fastbert.nn import int8
from fastbert.nn.int8 import Int8Linear
from fastbert.nn.int8_checks import why_not_exact
from fastbert.nn.layer import ACTIVATIONS, GELUS, LayerSettings, LayerWeights
from fastbert.nn.packing import Packing
from fastbert.nn.watch import log_once
from fastbert.ops._check import cu_seqlens_valid

# a layer's parameters by the fields of LayerWeights; the tensors of a field lie one below the other in its copy. A
# field is empty where the layer has no such parameter. An int8 weight is alone in its field
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
        # (n, 8) int64 and (n, 3) fp32 in the order of csrc/cpu/encoder.h
        self._settings: tuple[Tensor, Tensor] | None = None
        # the packed weights' memory, its checksum, and those of the sampled rows by the first row
        self._seal: tuple[Tensor, int, list[int]] | None = None
        self._calls = 0
        # a decoder's weight, its checksum and its copy
        self._table: tuple[Tensor, int, Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> Copies:
        return type(self)(self.bits)

    def __reduce__(self) -> Any:
        return type(self), (self.bits,)

    def nbytes(self) -> int:
        """Bytes of the copies, of every dtype."""
        table = 0 if self._table is None else self._table[2].nbytes
        return table + sum(t.nbytes for _, kept in self._packs.values() for t in kept)

    def drop(self) -> None:
        """Forget the copies; the next forward makes them again."""
        self._packs.clear()
        self._seal = self._table = None
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

    def why_not_form(self, encoder: Any) -> str | None:
        """Why the native call has no layer like those of an encoder, None if it has them all."""
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
        # a layer that is used several times is packed once
        rows: dict[tuple[int, ...], list[int]] = {}
        uses = [tuple(id(t) for f in fields for t in f) for fields in layers]
        for i, (fields, s) in enumerate(zip(layers, settings, strict=True)):
            if uses[i] in rows:
                continue
            packed = [
                self._copy(f, dtype, name == "up" and s.gated, f"the weight {name} of layer {i}")
                for name, f in zip(LayerWeights._fields, fields, strict=True)
            ]
            rows[uses[i]] = [cpu.address(t) for t in packed]
            # fp32 biases and norms are read where they are, and int8 modules pack their own weights
            kept += [
                t
                for t, f in zip(packed, fields, strict=True)
                if t is not None and t is not f[0] and not isinstance(f[0], Int8Linear)
            ]
        # before the packs: another thread may run as soon as it finds those
        self._settings = _settings_tables(layers, settings)
        self._packs[dtype] = torch.tensor([rows[use] for use in uses], dtype=torch.int64), kept
        # not in `freeze`: deep copies and unpickled models are packed without a call of it
        _live.add(self)
        _watch_optimizers()

    def table(self, weight: Tensor) -> Tensor:
        """A decoder's weight (V, C) fp32, prepacked; the copy is kept as long as the numbers stay."""
        found = _checksum(torch.tensor([_block(weight)], dtype=torch.int64))
        kept = self._table
        if kept is None or kept[0] is not weight or kept[1] != found:
            kept = self._table = weight, found, packed([weight], torch.float32)
        return kept[2]

    def _copy(
        self, weights: Sequence[Any], dtype: torch.dtype, gated: bool, name: str
    ) -> Tensor | None:
        """What the native call reads of a field; `gated`: of the first weights of a gated feed-forward."""
        if not weights:
            return None
        if len(weights[0].shape) != 2:
            return _joined(weights)
        if not weights[0].shape.numel():
            # the native call does not read the matrices of a block without heads or columns
            return torch.empty(0)
        if isinstance(weights[0], Int8Linear):
            return weights[0].packed()
        if self.bits is None:
            return (_packed_gated if gated else packed)(weights, dtype)
        return int8.pack(*int8.split(torch.cat([w.detach() for w in weights]), name), self.bits)

    def run(
        self,
        x: Tensor,  # (T, C)
        packing: Packing,
        rows: Tensor | None,  # (R,) int64
        forms: Tensor | None = None,  # (n, 7) int64 in the order of csrc/cpu/encoder.h
        held: Tensor | None = None,  # (B, 3) int64 in the order of csrc/cpu/decode.h
    ) -> Tensor:
        """The last layer's output (T, C), or (R, C) at `rows`; the caller holds the tables that `forms` points to."""
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
            cpu.address(forms),
            table.shape[0],
            cpu.address(rows),
            0 if rows is None else count,
            cpu.address(held),
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
    if reason := why_not_form(fields, settings, bits):
        return reason
    for name, field in zip(LayerWeights._fields, fields or (), strict=True):
        label = _label(name)
        for t in field:
            if isinstance(t, Int8Linear):
                if reason := _why_not_these_integers(label, t, bits):
                    return reason
            elif reason := cpu.unsupported_parameter(label, t):
                return reason
    return None


def why_not_form(
    fields: Fields | None, settings: LayerSettings, bits: int | None = None
) -> str | None:
    """Why the native call has no such layer, whatever dtype and device its parameters have; None if it has."""
    if settings.activation not in (ACTIVATIONS if settings.gated else GELUS):
        return "the activation is not GELU" + (" or SiLU" if settings.gated else "")
    if settings.rms_norm and not settings.pre_norm:
        return "its norms are RMSNorms that stand behind the blocks"
    if fields is None:
        own = "a Linear or a norm is not torch.nn's own"
        return f"{own}, or projections that are one product differ in biases, width or dtype"
    for name, field in zip(LayerWeights._fields, fields, strict=True):
        # the first norm of a pre-norm model may stand in the embeddings
        optional = name.endswith("bias") or (name == "attention_norm" and settings.pre_norm)
        if not field and not optional:
            return f"it has no {_label(name)}"
    return _why_not_these_shapes(LayerWeights(*fields), settings, bits)


def _why_not_these_shapes(w: LayerWeights, settings: LayerSettings, bits: int | None) -> str | None:
    """Why weights of these shapes, each field a list, are not those of a layer of these settings."""
    matrices = w.qkv[0].shape, w.out[0].shape, w.up[0].shape, w.down[0].shape
    if any(len(shape) != 2 for shape in matrices):
        return f"its weights have shapes {[*map(tuple, matrices)]}, not those of matrices"
    C, A, F = w.qkv[0].shape[1], w.out[0].shape[1], w.down[0].shape[1]
    keys = _key_heads(settings) * (A // max(settings.heads, 1))
    wanted = LayerWeights.shapes(C, A, F)
    wanted = wanted._replace(qkv=(A + 2 * keys, C), qkv_bias=(A + 2 * keys,))
    if settings.gated:
        wanted = wanted._replace(up=(2 * F, C), up_bias=(2 * F,))
    pieces = {"qkv": [A, keys, keys], "up": [F, F]}
    for name, field, size in zip(LayerWeights._fields, w, wanted, strict=True):
        rows = [size[0]] if len(field) < 2 else pieces[name.removesuffix("_bias")]
        for t, count in zip(field, rows, strict=False):
            if tuple(t.shape) != (count, *size[1:]):
                return f"its {name} has shape {tuple(t.shape)}, not {(count, *size[1:])}"
    if A % max(settings.heads, 1):
        return f"{A} columns are not {settings.heads} heads"
    if MOST_D * settings.heads < A:
        return f"the head size is {A // max(settings.heads, 1)}, and the cpu kernel goes up to {MOST_D}"
    return None if bits is None else why_not_exact(max(C, A, F), bits)


def _label(name: str) -> str:
    return name if name.endswith("bias") else f"{name}.weight"


def _key_heads(settings: LayerSettings) -> int:
    return settings.heads if settings.kv_heads is None else settings.kv_heads


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
        activation = cpu.ACTIVATIONS[s.activation]
        kinds = int(s.pre_norm), int(s.gated), int(s.rms_norm)
        sizes.append([s.heads, head, w.down[0].shape[1], activation, _key_heads(s), *kinds])
        scale = max(head, 1) ** -0.5 if s.scale is None else s.scale
        numbers.append([s.attention_eps, s.output_eps, scale])
    return torch.tensor(sizes, dtype=torch.int64), torch.tensor(numbers, dtype=torch.float32)


def packed(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One weight or three, one below the other, (N, K) in the GEMM's own order, for inputs of this dtype."""
    if len({w.shape for w in weights}) > 1:
        weights = [torch.cat([w.detach() for w in weights])]
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


def _packed_gated(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The first weights of a gated feed-forward, one (2 F, K) or two (F, K), packed as `packed` does."""
    halves = [w.detach().contiguous() for w in weights]
    gate, other = halves if len(halves) == 2 else halves[0].chunk(2)
    (F, K), kind = gate.shape, cpu.DTYPES[dtype]
    size = cpu.native.gated_feed_forward_packed_size(kind, F, K)
    packed = cpu.fresh(gate, size, dtype=torch.float32)
    cpu.native.gated_feed_forward_pack(
        kind,
        cpu.DTYPES[gate.dtype],
        gate.data_ptr(),
        other.data_ptr(),
        packed.data_ptr(),
        F,
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
