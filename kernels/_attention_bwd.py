"""The backward kernels of attention: one for whole short sequences; for others one for dK and dV and one for dQ."""

from __future__ import annotations

import triton
import triton.language as tl

from fastbert.kernels._attend import (
    VARYING,
    head_bias,
    load_tile,
    seen,
    span,
    store_tile,
    weights_and_ds,
    zero_tail,
)
from fastbert.kernels._math import LOG2E

# keys of the smallest tile, if BLOCK_N is not smaller still
SMALLEST = tl.constexpr(32)


@triton.jit(do_not_specialize=["N"])
def _attention_bwd_delta_kernel(
    dout_ptr,  # (T, H, D)
    out_ptr,  # (T, H, D)
    delta_ptr,  # (H, T)
    N,  # T H
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # delta = rowsum(dO O)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    do = load_tile(dout_ptr, i, D, N, D, BLOCK_D).to(tl.float32)
    o = load_tile(out_ptr, i, D, N, D, BLOCK_D).to(tl.float32)
    at = (i % H).to(tl.int64) * T + i // H
    tl.store(delta_ptr + at, tl.sum(do * o, 1), mask=i < N)


@triton.jit
def _whole(
    dout_ptr,  # this and the next three: of this sequence and head
    qkv_ptr,
    lse_ptr,
    dqkv_ptr,
    length,
    scale,
    drop,
    keep_scale,
    bias,
    H: tl.constexpr,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A sequence of at most BLOCK_N tokens: blocks of queries add to dV = (P M)^T dO and dK = scale dS^T Q.

    Each block writes its rows of dQ = scale dS K.
    """
    j = tl.arange(0, BLOCK_N)
    k = load_tile(qkv_ptr + H * D, j, 3 * H * D, length, D, BLOCK_D)
    v = load_tile(qkv_ptr + 2 * H * D, j, 3 * H * D, length, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i0 in range(0, length, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        q = load_tile(qkv_ptr, i, 3 * H * D, length, D, BLOCK_D)
        do = load_tile(dout_ptr, i, H * D, length, D, BLOCK_D)
        lse = tl.load(lse_ptr + i, mask=i < length, other=0.0) * LOG2E
        dropped, ds = weights_and_ds(
            q,
            do,
            k,
            v,
            lse,
            None,
            i,
            0,
            length,
            scale * LOG2E,
            drop,
            keep_scale,
            bias,
            True,
            LEFT,
            RIGHT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )
        dv = tl.dot(tl.trans(dropped), do, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        dq = tl.dot(ds, k, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), input_precision=PRECISION)
        store_tile(dqkv_ptr, dq * scale, i, 3 * H * D, length, D, BLOCK_D)
    store_tile(dqkv_ptr + H * D, dk * scale, j, 3 * H * D, length, D, BLOCK_D)
    store_tile(dqkv_ptr + 2 * H * D, dv, j, 3 * H * D, length, D, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _attention_bwd_kernel(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, 3, H, D)
    lse_ptr,  # (H, T)
    cu_ptr,  # (B + 1,)
    dqkv_ptr,  # (T, 3, H, D)
    seed_ptr,  # (1,), or None
    bias_ptr,  # (H, 2 P - 1), or None
    T,
    B,
    P,
    scale,
    site,
    threshold,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one sequence of at most BLOCK_N tokens, in the smallest tile of keys that holds it
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    start, length = span(cu_ptr, b, B, T)
    row = start.to(tl.int64)
    dqkv_ptr += row * (3 * H * D) + h * D
    if b == B:
        for part in tl.static_range(3):
            zero_tail(dqkv_ptr + part * H * D, 3 * H * D, length, 0, 1, BLOCK_M, D, BLOCK_D)
        return
    qkv_ptr += row * (3 * H * D) + h * D
    dout_ptr += row * (H * D) + h * D
    lse_ptr += h.to(tl.int64) * T + row
    drop = None
    if seed_ptr is not None:
        drop = (tl.load(seed_ptr), tl.program_id(0), site, threshold)
    for halvings in tl.static_range(3):
        if BLOCK_N >> halvings >= SMALLEST or halvings == 0:
            # the smallest tile also takes all shorter sequences
            more = halvings < 2 and BLOCK_N >> halvings >= 2 * SMALLEST
            least = BLOCK_N >> halvings + 1 if more else -1
            if (length <= BLOCK_N >> halvings) & (length > least):
                _whole(
                    dout_ptr,
                    qkv_ptr,
                    lse_ptr,
                    dqkv_ptr,
                    length,
                    scale,
                    drop,
                    keep_scale,
                    head_bias(bias_ptr, h, P),
                    H,
                    D,
                    LEFT,
                    RIGHT,
                    PRECISION,
                    BLOCK_M,
                    BLOCK_N >> halvings,
                    BLOCK_D,
                )


@triton.jit
def _add_queries(
    sums,  # dK / scale and dV, each (BLOCK_N, BLOCK_D)
    q_ptr,  # this and the next three: of this sequence and query head
    dout_ptr,
    lse_ptr,
    delta_ptr,
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_D)
    j0,  # the number of the first key
    length,
    scale,
    drop,
    keep_scale,
    bias,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the queries of one head that see the keys."""
    dk, dv = sums
    begin, stop = seen(j0, BLOCK_N, length, RIGHT, LEFT, BLOCK_M)
    for i0 in range(begin, stop, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, i, STRIDE, length, D, BLOCK_D)
        do = load_tile(dout_ptr, i, H * D, length, D, BLOCK_D)
        lse = tl.load(lse_ptr + i, mask=i < length, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + i, mask=i < length, other=0.0)
        dropped, ds = weights_and_ds(
            q,
            do,
            k,
            v,
            lse,
            delta,
            i,
            j0,
            length,
            scale * LOG2E,
            drop,
            keep_scale,
            bias,
            LEFT >= 0 or RIGHT >= 0,
            LEFT,
            RIGHT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )
        dv = tl.dot(tl.trans(dropped), do, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def _attention_bwd_dkdv_kernel(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, H + 2 KV, D)
    lse_ptr,  # (H, T)
    delta_ptr,  # (H, T)
    cu_ptr,  # (B + 1,)
    dqkv_ptr,  # (T, H + 2 KV, D)
    seed_ptr,  # (1,), or None
    bias_ptr,  # (H, 2 P - 1), or None
    T,
    B,
    P,
    BLOCKS,
    scale,
    site,
    threshold,
    keep_scale,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # BLOCK_N keys against the tiles of queries that see them: dV = (P M)^T dO,  dK = scale dS^T Q, summed in order over
    # the H // KV query heads that read key head `kv`
    block, kv = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS % KV
    b = tl.program_id(0) // BLOCKS // KV
    start, length = span(cu_ptr, b, B, T)
    row = start.to(tl.int64)
    STRIDE: tl.constexpr = (H + 2 * KV) * D
    dk_ptr = dqkv_ptr + row * STRIDE + (H + kv) * D
    dv_ptr = dk_ptr + KV * D
    if b == B:
        zero_tail(dk_ptr, STRIDE, length, block, BLOCKS, BLOCK_N, D, BLOCK_D)
        zero_tail(dv_ptr, STRIDE, length, block, BLOCKS, BLOCK_N, D, BLOCK_D)
        return
    if block * BLOCK_N >= length:
        return
    qkv_ptr += row * STRIDE
    dout_ptr += row * (H * D)
    j0 = block * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_tile(qkv_ptr + (H + kv) * D, j, STRIDE, length, D, BLOCK_D)
    v = load_tile(qkv_ptr + (H + KV + kv) * D, j, STRIDE, length, D, BLOCK_D)
    sums = (tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32))
    GROUP: tl.constexpr = H // KV
    for g in range(GROUP):
        h = kv * GROUP + g
        at = h.to(tl.int64) * T + row
        drop = None
        if seed_ptr is not None:
            drop = (tl.load(seed_ptr), b * H + h, site, threshold)
        sums = _add_queries(
            sums,
            qkv_ptr + h * D,
            dout_ptr + h * D,
            lse_ptr + at,
            delta_ptr + at,
            k,
            v,
            j0,
            length,
            scale,
            drop,
            keep_scale,
            head_bias(bias_ptr, h, P),
            STRIDE,
            H,
            D,
            LEFT,
            RIGHT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
    dk, dv = sums
    store_tile(dk_ptr, dk * scale, j, STRIDE, length, D, BLOCK_D)
    store_tile(dv_ptr, dv, j, STRIDE, length, D, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _attention_bwd_dq_kernel(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, H + 2 KV, D)
    lse_ptr,  # (H, T)
    delta_ptr,  # (H, T)
    cu_ptr,  # (B + 1,)
    dqkv_ptr,  # (T, H + 2 KV, D)
    seed_ptr,  # (1,), or None
    bias_ptr,  # (H, 2 P - 1), or None
    T,
    B,
    P,
    BLOCKS,
    scale,
    site,
    threshold,
    keep_scale,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # BLOCK_M queries against the tiles of keys that they see: dQ = scale dS K
    block, bh = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    b, h = bh // H, bh % H
    start, length = span(cu_ptr, b, B, T)
    row = start.to(tl.int64)
    STRIDE: tl.constexpr = (H + 2 * KV) * D
    dqkv_ptr += row * STRIDE + h * D
    if b == B:
        zero_tail(dqkv_ptr, STRIDE, length, block, BLOCKS, BLOCK_M, D, BLOCK_D)
        return
    if block * BLOCK_M >= length:
        return
    qkv_ptr += row * STRIDE
    k_ptr = qkv_ptr + (H + h // (H // KV)) * D
    at = h.to(tl.int64) * T + row
    drop = None
    if seed_ptr is not None:
        drop = (tl.load(seed_ptr), bh, site, threshold)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_tile(qkv_ptr + h * D, i, STRIDE, length, D, BLOCK_D)
    do = load_tile(dout_ptr + row * (H * D) + h * D, i, H * D, length, D, BLOCK_D)
    lse = tl.load(lse_ptr + at + i, mask=i < length, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + at + i, mask=i < length, other=0.0)
    bias = head_bias(bias_ptr, h, P)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, stop = seen(block * BLOCK_M, BLOCK_M, length, LEFT, RIGHT, BLOCK_N)
    for j0 in range(begin, stop, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, j, STRIDE, length, D, BLOCK_D)
        v = load_tile(k_ptr + KV * D, j, STRIDE, length, D, BLOCK_D)
        _, ds = weights_and_ds(
            q,
            do,
            k,
            v,
            lse,
            delta,
            i,
            j0,
            length,
            scale * LOG2E,
            drop,
            keep_scale,
            bias,
            True,
            LEFT,
            RIGHT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    store_tile(dqkv_ptr, dq * scale, i, STRIDE, length, D, BLOCK_D)
