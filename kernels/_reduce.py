"""Deterministic sums over rows: each program stores one partial sum in fp32, and a second kernel adds these up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _launch, dense

# up to this many rows `sum_rows` needs only one launch
_FEW = 512
# a program's tile in `sum_rows`, and its programs per multiprocessor
_TILE, _PROGRAMS = _launch.Tiles(32, 64, 4), 8


@triton.jit(do_not_specialize=["N"])
def _sum_rows_kernel(
    x_ptr,  # (N, C)
    partial_ptr,  # (1, programs, C) fp32
    N,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # each program sums an equal share of consecutive rows
    program, share = tl.program_id(0), tl.cdiv(N, tl.num_programs(0))
    stop = tl.minimum((program + 1) * share, N)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(program * share, stop, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        inside = (rows < stop)[:, None] & (cols < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        total += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(partial_ptr + program * C + cols, tl.sum(total, 0), mask=cols < C)


@triton.jit
def _sum_partials_kernel(
    partial_ptr,  # (OUTPUTS, P, C) fp32
    first_ptr,  # (C,)
    second_ptr,  # (C,), or None
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    which = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    partial_ptr += which * P * C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        inside = (rows < P)[:, None] & (cols < C)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * C + cols[None, :], mask=inside, other=0.0)
    total = tl.sum(total, 0)
    if which == 0:
        tl.store(first_ptr + cols, total, mask=cols < C)
    elif second_ptr is not None:
        tl.store(second_ptr + cols, total, mask=cols < C)


def sum_partials(partial: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    """Sums over P of partial (len(dtypes), P, C), one (C,) in each dtype; at most two."""
    _, P, C = partial.shape
    outs = tuple(partial.new_empty(C, dtype=dtype) for dtype in dtypes)
    second = outs[1] if len(outs) > 1 else None
    _sum_partials_kernel[(triton.cdiv(C, 8), len(outs))](
        partial, outs[0], second, P, C, BLOCK_P=1024, BLOCK_C=8, num_warps=16, **_launch.FUSED
    )
    return outs


def sum_rows(x: Tensor) -> Tensor:
    """Sum over the rows of x (N, C), as (C,) fp32: the gradient of a bias."""
    N, C = x.shape
    if x.numel() == 0:
        return x.new_zeros(C, dtype=torch.float32)
    columns = triton.cdiv(C, _TILE.BLOCK_N)
    most = max(1, _PROGRAMS * _launch.multiprocessors(x.device) // columns)
    programs = min(triton.cdiv(N, _TILE.BLOCK_M), most)
    # few rows are not worth a second launch
    programs = 1 if N <= _FEW else programs
    partial = x.new_empty(1, programs, C, dtype=torch.float32)
    _sum_rows_kernel[(programs, columns)](dense(x), partial, N, C, **vars(_TILE))
    return partial[0, 0] if programs == 1 else sum_partials(partial, torch.float32)[0]
