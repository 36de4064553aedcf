"""Rotary positions of attention's queries and keys: a pass of its own before attention, and one after its backward.

attention reads every key once for each block of queries. Turned inside its loops, keys would be loaded twice, as they
are and with the halves exchanged, beside fp32 cosines and sines, and would pass through registers instead of going from
memory to shared memory directly. One pass reads and writes what qkv_proj has just left in L2, and attention's kernels
stay the same. backward turns a copy again, which costs less than to keep one, and turns dq and dk back in place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastbert.backend.reference.attention_form import sizes
from fastbert.kernels import _tiles
from fastbert.kernels._attend import load_tile, span, store_tile


@triton.jit
def _turned(
    a, b, i, length, table_ptr, HALF: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr
):
    """c a - s b and c b + s a of rows i, with the cosines and sines (length, 2, HALF) of their positions."""
    c = load_tile(table_ptr, i, 2 * HALF, length, HALF, BLOCK)
    s = load_tile(table_ptr + HALF, i, 2 * HALF, length, HALF, BLOCK)
    if BACK:
        s = 0.0 - s
    a, b = a.to(tl.float32), b.to(tl.float32)
    return c * a - s * b, c * b + s * a


@triton.jit(do_not_specialize=["T", "B", "P", "BLOCKS"])
def _attention_rope_kernel(
    x_ptr,  # (T, HEADS, D)
    y_ptr,  # (T, HEADS, D); x without COPY
    table_ptr,  # (P, 2, HALF)
    cu_ptr,  # (B + 1,)
    T,
    B,
    P,
    BLOCKS,
    HEADS: tl.constexpr,
    TURNED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BACK: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # BLOCK_M tokens of one sequence and one head; the first TURNED heads are turned, the others only copied
    count: tl.constexpr = HEADS if COPY else TURNED
    h, block = tl.program_id(0) % count, tl.program_id(0) // count % BLOCKS
    start, length = span(cu_ptr, tl.program_id(0) // count // BLOCKS, B, T)
    # a wrong max_seqlen reads nothing past the table
    length = tl.minimum(length, P)
    if block * BLOCK_M >= length:
        return
    stride: tl.constexpr = HEADS * D
    x_ptr += start.to(tl.int64) * stride + h * D
    y_ptr += start.to(tl.int64) * stride + h * D
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if h < TURNED:
        if PAIRS:
            x = load_tile(x_ptr, i, stride, length, 2 * HALF, 2 * BLOCK_N)
            a, b = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_N, 2)))
            a, b = _turned(a, b, i, length, table_ptr, HALF, BACK, BLOCK_N)
            y = tl.reshape(tl.join(a, b), (BLOCK_M, 2 * BLOCK_N))
            store_tile(y_ptr, y, i, stride, length, 2 * HALF, 2 * BLOCK_N)
        else:
            a = load_tile(x_ptr, i, stride, length, HALF, BLOCK_N)
            b = load_tile(x_ptr + HALF, i, stride, length, HALF, BLOCK_N)
            a, b = _turned(a, b, i, length, table_ptr, HALF, BACK, BLOCK_N)
            store_tile(y_ptr, a, i, stride, length, HALF, BLOCK_N)
            store_tile(y_ptr + HALF, b, i, stride, length, HALF, BLOCK_N)
        if COPY and 2 * HALF < D:
            rest: tl.constexpr = D - 2 * HALF
            x = load_tile(x_ptr + 2 * HALF, i, stride, length, rest, BLOCK_D)
            store_tile(y_ptr + 2 * HALF, x, i, stride, length, rest, BLOCK_D)
    elif COPY:
        x = load_tile(x_ptr, i, stride, length, D, BLOCK_D)
        store_tile(y_ptr, x, i, stride, length, D, BLOCK_D)


def rotate(
    x: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
    y: Tensor,  # like x
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    kv_heads: int,
    table: Tensor,  # (P, 2, R / 2) fp32
    pairs: bool,
    back: bool = False,
) -> Tensor:
    """y = x with queries and keys turned by their positions, or turned back; y may be x. Leaves rows past the end."""
    H, _, D = sizes(x, kv_heads)
    heads, turned, half = H + 2 * kv_heads, H + kv_heads, table.shape[2]
    B, config = cu_seqlens.shape[0] - 1, _tiles.rope(half)
    blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_M))
    _attention_rope_kernel[(B * blocks * (turned if y is x else heads),)](
        x,
        y,
        table,
        cu_seqlens,
        x.shape[0],
        B,
        table.shape[0],
        blocks,
        HEADS=heads,
        TURNED=turned,
        D=D,
        HALF=half,
        PAIRS=pairs,
        BACK=back,
        COPY=y is not x,
        BLOCK_D=_tiles.head_block(D),
        **vars(config),
    )
    return y
