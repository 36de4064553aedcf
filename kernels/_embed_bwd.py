"""The gradient of table[ids]: rows summed by id without atomics, in a fixed order.

A stable sort of the ids fixes the order of every sum. A program reads CHUNK sorted positions and writes the sums of the
segments of equal ids that lie inside. At most two segments cross its borders: it stores their partial sums, which a
second kernel adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _launch

_CHUNK = 32


@triton.jit
def _row(dz_ptr, order_ptr, at, stop, C, cols):
    row = tl.load(order_ptr + at, mask=at < stop, other=0).to(tl.int64)
    return tl.load(dz_ptr + row * C + cols, mask=cols < tl.where(at < stop, C, 0), other=0.0)


@triton.jit
def _four_rows(dz_ptr, order_ptr, at, stop, C, cols):
    """The rows of dz at four sorted positions, zeros from `stop` on."""
    return (
        _row(dz_ptr, order_ptr, at, stop, C, cols),
        _row(dz_ptr, order_ptr, at + 1, stop, C, cols),
        _row(dz_ptr, order_ptr, at + 2, stop, C, cols),
        _row(dz_ptr, order_ptr, at + 3, stop, C, cols),
    )


@triton.jit(do_not_specialize=["N", "V", "padding"])
def _embed_bwd_segments_kernel(
    dz_ptr,  # (N, C) fp32
    ids_ptr,  # (N,) sorted
    order_ptr,  # (N,) the row of dz at each sorted position
    grad_ptr,  # (V, C)
    partial_ptr,  # (chunks, 2, C) fp32: a segment from an earlier chunk; one that starts here and continues
    N,
    V,
    padding,
    C,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, N)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    after = tl.load(ids_ptr + stop, mask=stop < N, other=-1)
    partial_ptr += chunk.to(tl.int64) * 2 * C
    total = tl.zeros((BLOCK_C,), tl.float32)
    # whether this segment started in an earlier chunk
    came = (first > 0) & (tl.load(ids_ptr + first) == before)
    for four in range(first, stop, 4):
        # all four loads start before the first store
        rows = _four_rows(dz_ptr, order_ptr, four, stop, C, cols)
        for k in tl.static_range(4):
            at = four + k
            this = tl.load(ids_ptr + at, mask=at < stop, other=after)
            total += rows[k]
            follows = tl.load(ids_ptr + at + 1, mask=at + 1 < stop, other=after)
            if (at + 1 == stop) | ((at < stop) & (follows != this)):
                if came:
                    tl.store(partial_ptr + cols, total, mask=cols < C)
                elif (at + 1 < N) & (follows == this):
                    tl.store(partial_ptr + C + cols, total, mask=cols < C)
                elif (this != padding) & (this >= 0) & (this < V):
                    tl.store(grad_ptr + this.to(tl.int64) * C + cols, total, mask=cols < C)
                total = tl.zeros((BLOCK_C,), tl.float32)
                came = came & False


@triton.jit(do_not_specialize=["N", "V", "padding"])
def _embed_bwd_crossing_kernel(
    ids_ptr,  # (N,) sorted
    grad_ptr,  # (V, C)
    partial_ptr,  # (chunks, 2, C) fp32
    N,
    V,
    padding,
    C,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # adds the later chunks' sums of a segment that starts in this chunk and continues
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    stop = (chunk + 1) * CHUNK
    if stop >= N:
        return
    this = tl.load(ids_ptr + stop - 1)
    # the last segment must continue in the next chunk, and must start in this one
    if tl.load(ids_ptr + stop) != this:
        return
    before = tl.load(ids_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=this + 1)
    if before == this:
        return
    if (this == padding) | (this < 0) | (this >= V):
        return
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = partial_ptr + (chunk.to(tl.int64) * 2 + 1) * C + cols
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    start = chunk + 1
    more = True
    while more:
        later = start + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + later * CHUNK, mask=later < chunks, other=-1)
        same = (later < chunks) & (ids == this)
        at = later.to(tl.int64)[:, None] * (2 * C) + cols[None, :]
        total += tl.load(partial_ptr + at, mask=same[:, None] & (cols < C)[None, :], other=0.0)
        more = tl.sum(same.to(tl.int32), 0) == BLOCK_K
        start += BLOCK_K
    total_row = tl.load(own, mask=cols < C, other=0.0) + tl.sum(total, 0)
    tl.store(grad_ptr + this.to(tl.int64) * C + cols, total_row, mask=cols < C)


def _narrow(ids: Tensor, rows: int) -> Tensor:
    """ids in the narrowest integer type: the sort needs a pass per byte. Ids out of range stay out of range."""
    kinds = (torch.int8, torch.int16, torch.int32)
    return ids.clamp(-1, rows).to(next(kind for kind in kinds if rows <= torch.iinfo(kind).max))


def scatter(dz: Tensor, ids: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
    """The gradient of table[ids] for dz (N, C) fp32: rows of equal id summed in a fixed order, none for padding_idx."""
    N, C = dz.shape
    grad = torch.zeros_like(table, memory_format=torch.contiguous_format)
    if table.shape[0] == 0:
        return grad
    ids, order = torch.sort(_narrow(ids, table.shape[0]), stable=True)
    chunks = triton.cdiv(N, _CHUNK)
    partial = dz.new_empty(chunks, 2, C)
    padding = -1 if padding_idx is None else padding_idx
    block = min(256, triton.next_power_of_2(C))
    grid = (chunks, triton.cdiv(C, block))
    last = (N, table.shape[0], padding, C, _CHUNK)
    _embed_bwd_segments_kernel[grid](
        dz, ids, order, grad, partial, *last, block, num_warps=2, **_launch.FUSED
    )
    block = min(64, block)
    grid = (chunks, triton.cdiv(C, block))
    _embed_bwd_crossing_kernel[grid](
        ids, grad, partial, *last, 32, block, num_warps=4, **_launch.FUSED
    )
    return grad
