"""What the kernels of whole rows (ROWS, BLOCK_C) share: dropout, a normalisation's gradient, a program's sums.

A helper has one return: Triton compiles what follows an early one, and the interpreter does not show it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastbert.kernels._math import keep, norm_backward


@triton.jit
def drop_rows(
    values, seed_ptr, numbers, site, threshold, scale, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Dropout of rows that count by `numbers` (ROWS,); the values themselves without a seed."""
    if seed_ptr is not None:
        quads = tl.arange(0, BLOCK_C // 4)[None, :]
        seed = tl.load(seed_ptr)
        kept = keep(seed, quads, numbers[:, None], site, 0, threshold, ROWS, BLOCK_C)
        values = tl.where(kept, values * scale, 0.0)
    return values


@triton.jit
def load_vector(vector_ptr, cols, C):
    """(1, BLOCK_C) fp32 of a vector (C,), 0 outside."""
    return tl.load(vector_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def row_gradient(g, z, weight_ptr, mean_ptr, rstd_ptr, rows, cols, inside, N, C):
    """The gradient of z, normalised with the saved statistics, and xhat; g is that of the output, 0 outside."""
    mean = tl.load(mean_ptr + rows, mask=rows < N, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
    xhat = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
    if weight_ptr is not None:
        g = g * load_vector(weight_ptr, cols, C)
    return norm_backward(g, xhat, rstd, C), xhat


@triton.jit
def store_sums(partial_ptr, dweight, dbias, cols, C):
    """This program's sums over its rows into partial (2, programs, C)."""
    at = partial_ptr + tl.program_id(0) * C + cols
    tl.store(at, tl.sum(dweight, 0), mask=cols < C)
    tl.store(at + tl.num_programs(0) * C, tl.sum(dbias, 0), mask=cols < C)
