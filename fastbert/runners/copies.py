"""Prepacked copies of weights."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastbert.backend import cpu
from fastbert.backend.cpu import _gemm
from fastbert.nn.packing import Packing
from fastbert.ops._check import cu_seqlens_valid

# why layers have to run
RECORDED = "gradients are recorded, call it under torch.no_grad() or torch.inference_mode()"


# those that hold copies
_live: weakref.WeakSet[Copies] = weakref.WeakSet()


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
