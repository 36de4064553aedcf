"""Helpers of the kernels of whole rows (ROWS, BLOCK_C): dropout, a normalisation's gradient, a program's sums.

C is a compile-time constant: if a warp holds a whole row, columns from C on cost nothing.
A helper has one return: Triton also compiles the code after an early return, which the interpreter does not show.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastbert.kernels._math import keep, norm_backward


@triton.jit
def drop_rows(
    values,
    inside,
    seed_ptr,
    numbers,
    site,
    threshold,
    scale,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Dropout of rows with these absolute `numbers` (ROWS,), 0 outside; without a seed, the values unchanged.

    WIDE: a thread holds 8 adjacent columns, 16 bytes of a 16-bit row, and makes their bits itself by two Philox calls.
    """
    if seed_ptr is not None:
        seed, rows = tl.load(seed_ptr), numbers[:, None]
        if WIDE:
            eights = tl.arange(0, BLOCK_C // 8)[None, :]
            left = keep(seed, 2 * eights, rows, site, 0, threshold, ROWS, BLOCK_C // 2)
            right = keep(seed, 2 * eights + 1, rows, site, 0, threshold, ROWS, BLOCK_C // 2)
            both = tl.join(
                tl.reshape(left, (ROWS, BLOCK_C // 8, 4)),
                tl.reshape(right, (ROWS, BLOCK_C // 8, 4)),
            )
            kept = tl.reshape(tl.permute(both, 0, 1, 3, 2), (ROWS, BLOCK_C))
        else:
            quads = tl.arange(0, BLOCK_C // 4)[None, :]
            kept = keep(seed, quads, rows, site, 0, threshold, ROWS, BLOCK_C)
        values = tl.where(kept & inside, values * scale, 0.0)
    return values


@triton.jit
def load_vector(vector_ptr, cols, C):
    """A vector (C,) as (1, BLOCK_C) fp32, 0 outside."""
    return tl.load(vector_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def row_gradient(g, z, weight, bias, mean_ptr, rstd_ptr, rows, inside, N, C):
    """The gradient of a normalisation's input, and xhat; g is the gradient of its output, 0 outside.

    Without a bias z is the input. With one z is the output, and xhat is rebuilt from it: 0 where the weight is 0, and
    clamped to sqrt(C), which no normalised row exceeds.
    """
    rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
    if bias is None:
        mean = tl.load(mean_ptr + rows, mask=rows < N, other=0.0)
        xhat = (z - mean[:, None]) * rstd[:, None]
    else:
        largest = tl.sqrt(tl.full((1, 1), C, tl.float32))
        xhat = tl.where(weight == 0, 0.0, (z - bias) / weight)
        xhat = tl.minimum(tl.maximum(xhat, -largest), largest)
    xhat = tl.where(inside, xhat, 0.0)
    return norm_backward(g * weight, xhat, rstd, C), xhat


@triton.jit
def store_sums(partial_ptr, dweight, dbias, cols, C):
    """Store this program's sums over its rows in partial (2, programs, C)."""
    at = partial_ptr + tl.program_id(0) * C + cols
    tl.store(at, tl.sum(dweight, 0), mask=cols < C)
    tl.store(at + tl.num_programs(0) * C, tl.sum(dbias, 0), mask=cols < C)
