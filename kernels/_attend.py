"""Helpers of the attention kernels: a sequence's span, its tiles, the softmax step and the products of backward.

Queries i and keys j are numbered within a sequence. `drop` is (seed, b H + h, site, threshold), None without dropout.
Query i sees the keys from i - LEFT to i + RIGHT, where -1 stands for no bound. `bias` is (the 2 P - 1 biases of this
head, P), or None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastbert.kernels._math import LOG2E, keep

# arguments that vary between calls; excluded from Triton's specialisation
VARYING = ["T", "B", "P", "BLOCKS", "site", "threshold"]


@triton.jit
def span(cu_ptr, b, B, T):
    """Start and length of sequence b, clamped to the T rows; for b = B, of the rows past the last sequence."""
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), T)
    stop = tl.load(cu_ptr + b + 1, mask=b < B, other=T)
    return start, tl.minimum(tl.maximum(stop, start), T) - start


@triton.jit
def load_tile(base_ptr, i, stride: tl.constexpr, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows i (BLOCK,) of a matrix (length, D), zeros outside: (BLOCK, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)
    inside = (i < length)[:, None]
    if D < BLOCK_D:
        inside = inside & (d < D)[None, :]
    return tl.load(base_ptr + i.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(
    base_ptr, values, i, stride: tl.constexpr, length, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store values (BLOCK, BLOCK_D) in rows i of a matrix (length, D)."""
    d = tl.arange(0, BLOCK_D)
    inside = (i < length)[:, None]
    if D < BLOCK_D:
        inside = inside & (d < D)[None, :]
    tl.store(base_ptr + i.to(tl.int64)[:, None] * stride + d[None, :], values, mask=inside)


@triton.jit
def zero_tail(
    base_ptr,
    stride: tl.constexpr,
    length,
    block,
    BLOCKS,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fill a matrix (length, D) with zeros; BLOCKS programs share its rows."""
    zeros = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(block * ROWS, length, BLOCKS * ROWS):
        i = first + tl.arange(0, ROWS)
        store_tile(base_ptr, zeros, i, stride, length, D, BLOCK_D)


@triton.jit
def kept(drop, i, j0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mask of the weights that dropout keeps, for queries i and BLOCK_N keys from j0 on, a multiple of 4."""
    seed, bh, site, threshold = drop
    quads = j0 // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    return keep(seed, quads, i[:, None], bh, site, threshold, BLOCK_M, BLOCK_N)


@triton.jit
def seen(
    first,
    COUNT: tl.constexpr,
    length,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Start and stop of the tokens from BEFORE before to AFTER behind any of COUNT tokens; -1 stands for no bound.

    The COUNT tokens begin at `first`. The start is a multiple of BLOCK.
    """
    start = 0
    stop = length
    if BEFORE == 0:
        start = first // BLOCK * BLOCK
    elif BEFORE > 0:
        start = tl.maximum(first - BEFORE, 0) // BLOCK * BLOCK
    if AFTER >= 0:
        stop = tl.minimum(length, first + COUNT + AFTER)
    return start, stop


@triton.jit
def hide(s, i, j, length, MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Scores s (len(i), len(j)); with MASKED -inf past the last key and outside the window of query i."""
    if MASKED:
        s = tl.where((j < length)[None, :], s, -float("inf"))
        if RIGHT >= 0:
            s = tl.where(j[None, :] <= i[:, None] + RIGHT, s, -float("inf"))
        if LEFT >= 0:
            # rows past the last query get a finite score too
            first = tl.minimum(i, length - 1) - LEFT
            s = tl.where(j[None, :] >= first[:, None], s, -float("inf"))
    return s


@triton.jit
def head_bias(bias_ptr, h, P):
    """The tuple `bias` of head h; None if bias_ptr (H, 2 P - 1) is."""
    bias = None
    if bias_ptr is not None:
        bias = (bias_ptr + h * (2 * P - 1), P)
    return bias


@triton.jit
def biased(s, scale, bias, i, j, length):
    """scale s plus the bias of the distance j - i, in base 2; 0 past the last query."""
    head_ptr, P = bias
    at = j[None, :] - i[:, None] + (P - 1)
    inside = (i < length)[:, None] & (at >= 0) & (at < 2 * P - 1)
    return s * scale + tl.load(head_ptr + at, mask=inside, other=0.0) * LOG2E


@triton.jit
def attend(
    q,  # (BLOCK_M, BLOCK_D)
    k_ptr,  # of this sequence and head, as v_ptr
    v_ptr,
    i,  # (BLOCK_M,)
    j0,  # the number of the first key
    length,
    state,  # m, total (BLOCK_M,), acc (BLOCK_M, BLOCK_D)
    scale,  # in base 2, positive
    drop,
    bias,
    MASKED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add a tile of keys to the running maximum, the sum of powers and the weighted sum of values."""
    m, total, acc = state
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, j, STRIDE, length, D, BLOCK_D)
    v = load_tile(v_ptr, j, STRIDE, length, D, BLOCK_D)
    s = tl.dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), input_precision=PRECISION)
    if bias is not None:
        s = biased(s, scale, bias, i, j, length)
        scale = 1.0
    s = hide(s, i, j, length, MASKED, LEFT, RIGHT)
    top = tl.max(s, 1) * scale
    if not FIRST:
        top = tl.maximum(m, top)
        rescale = tl.exp2(m - top)
        total *= rescale
        acc *= rescale[:, None]
    weights = tl.exp2(s * scale - top[:, None])
    total += tl.sum(weights, 1)
    if drop is not None:
        weights = tl.where(kept(drop, i, j0, BLOCK_M, BLOCK_N), weights, 0.0)
    return top, total, tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)


@triton.jit
def weights_and_ds(
    q,  # (BLOCK_M, BLOCK_D)
    do,  # (BLOCK_M, BLOCK_D)
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_D)
    lse,  # (BLOCK_M,) in base 2
    delta,  # (BLOCK_M,), or None if the tile holds all keys
    i,
    j0,
    length,
    scale,  # in base 2
    drop,
    keep_scale,
    bias,
    MASKED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """P M and dS = P (M dO V^T - delta), (BLOCK_M, BLOCK_N) in q's dtype; M is dropout's factor.

    If q, dO, lse and delta are 0 in rows past the last query, P M is finite there and dS is 0.
    """
    none = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s = tl.dot(q, tl.trans(k), none, input_precision=PRECISION)
    j = j0 + tl.arange(0, BLOCK_N)
    if bias is not None:
        s = biased(s, scale, bias, i, j, length)
        scale = 1.0
    s = hide(s, i, j, length, MASKED, LEFT, RIGHT)
    p = tl.exp2(s * scale - lse[:, None])
    dp = tl.dot(do, tl.trans(v), none, input_precision=PRECISION)
    dropped = p
    if drop is not None:
        keeps = kept(drop, i, j0, BLOCK_M, BLOCK_N)
        dropped = tl.where(keeps, p * keep_scale, 0.0)
        dp = tl.where(keeps, dp * keep_scale, 0.0)
    if delta is None:
        delta = tl.sum(p * dp, 1)
    ds = p * (dp - delta[:, None])
    return dropped.to(q.dtype), ds.to(q.dtype)
