"""The second half of a deterministic sum over rows: programs left partial sums, one for each, in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels._launch import FUSED


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
    _sum_partials_kernel[(triton.cdiv(C, 32), len(outs))](
        partial, outs[0], second, P, C, BLOCK_P=64, BLOCK_C=32, num_warps=4, **FUSED
    )
    return outs
