"""attention in Triton: packed sequences, exact softmax, dropout replayed by absolute index, tiles past the end skipped.

A program takes BLOCK_M queries of one (sequence, head). Sequence B, one more than there are, stands for the rows past
cu_seqlens[-1], which are zeroed and never read. backward has no atomics: where the keys of a whole sequence fit a
tile (_tiles.attention_bwd says where) one kernel makes all five products of it, else dK, dV and dQ take a loop each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastbert.kernels import _launch, _tiles, dropout_args, unsupported_dropout, unsupported_dtype
from fastbert.kernels._attend import (
    attend,
    load_tile,
    span,
    store_tile,
    weights_and_ds,
    zero_tail,
)
from fastbert.kernels._math import LN2, LOG2E, dot
from torch import Tensor

_VARYING = ["T", "B", "BLOCKS", "site", "threshold"]


@triton.jit(do_not_specialize=_VARYING)
def _attention_fwd_kernel(
    qkv_ptr,  # (T, 3, H, D)
    cu_ptr,  # (B + 1,)
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T), or None
    seed_ptr,  # (1,), or None
    T,
    B,
    BLOCKS,
    scale,
    site,
    threshold,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # m: running maximum of the scores in base 2, total: sum of powers; out = acc / total, lse = ln 2 (m + log2 total)
    block, bh = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    b, h = bh // H, bh % H
    start, length = span(cu_ptr, b, B, T)
    row = start.to(tl.int64)
    out_ptr += row * (H * D) + h * D
    if b == B:
        zero_tail(out_ptr, H * D, length, block, BLOCKS, BLOCK_M, D, BLOCK_D)
        if lse_ptr is not None:
            lse_ptr += h.to(tl.int64) * T + row
            zero_tail(lse_ptr, 1, length, block, BLOCKS, BLOCK_M, 1, 1)
        return
    if block * BLOCK_M >= length:
        return
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    qkv_ptr += row * (3 * H * D) + h * D
    q = load_tile(qkv_ptr, i, 3 * H * D, length, D, BLOCK_D)
    drop = None
    if seed_ptr is not None:
        drop = (tl.load(seed_ptr), bh, site, threshold)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    stop = length
    if CAUSAL:
        stop = tl.minimum(length, (block + 1) * BLOCK_M)
    if ONE:
        # all keys are in one tile: no running maximum
        stop = 1
    for j0 in range(0, stop, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_tile(qkv_ptr + H * D, j, 3 * H * D, length, D, BLOCK_D)
        v = load_tile(qkv_ptr + 2 * H * D, j, 3 * H * D, length, D, BLOCK_D)
        m, total, acc = attend(
            q,
            k,
            v,
            i,
            j0,
            length,
            (m, total, acc),
            scale * LOG2E,
            drop,
            CAUSAL,
            PRECISION,
            ONE,
            BLOCK_M,
            BLOCK_N,
        )
    store_tile(out_ptr, acc * (keep_scale / total)[:, None], i, H * D, length, D, BLOCK_D)
    if lse_ptr is not None:
        lse_ptr += h.to(tl.int64) * T + row
        tl.store(lse_ptr + i, (m + tl.log2(total)) * LN2, mask=i < length)


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


@triton.jit(do_not_specialize=_VARYING)
def _attention_bwd_kernel(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, 3, H, D)
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T)
    cu_ptr,  # (B + 1,)
    dqkv_ptr,  # (T, 3, H, D)
    seed_ptr,  # (1,), or None
    T,
    B,
    scale,
    site,
    threshold,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # a whole sequence of at most BLOCK_N tokens: dV += (P M)^T dO, dK += dS^T Q stay here, dQ = dS K leaves complete
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
    out_ptr += row * (H * D) + h * D
    lse_ptr += h.to(tl.int64) * T + row
    drop = None
    if seed_ptr is not None:
        drop = (tl.load(seed_ptr), tl.program_id(0), site, threshold)
    j = tl.arange(0, BLOCK_N)
    k = load_tile(qkv_ptr + H * D, j, 3 * H * D, length, D, BLOCK_D)
    v = load_tile(qkv_ptr + 2 * H * D, j, 3 * H * D, length, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i0 in range(0, length, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        q = load_tile(qkv_ptr, i, 3 * H * D, length, D, BLOCK_D)
        do = load_tile(dout_ptr, i, H * D, length, D, BLOCK_D)
        o = load_tile(out_ptr, i, H * D, length, D, BLOCK_D)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        lse = tl.load(lse_ptr + i, mask=i < length, other=0.0) * LOG2E
        dropped, ds = weights_and_ds(
            q,
            do,
            k,
            v,
            lse,
            delta,
            i,
            0,
            length,
            scale * LOG2E,
            drop,
            keep_scale,
            CAUSAL,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )
        dv = dot(tl.trans(dropped), do, dv, PRECISION)
        dk = dot(tl.trans(ds), q, dk, PRECISION)
        dq = dot(ds, k, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), PRECISION)
        store_tile(dqkv_ptr, dq * scale, i, 3 * H * D, length, D, BLOCK_D)
    store_tile(dqkv_ptr + H * D, dk * scale, j, 3 * H * D, length, D, BLOCK_D)
    store_tile(dqkv_ptr + 2 * H * D, dv, j, 3 * H * D, length, D, BLOCK_D)


@triton.jit(do_not_specialize=_VARYING)
def _attention_bwd_dkdv_kernel(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, 3, H, D)
    lse_ptr,  # (H, T)
    delta_ptr,  # (H, T)
    cu_ptr,  # (B + 1,)
    dqkv_ptr,  # (T, 3, H, D)
    seed_ptr,  # (1,), or None
    T,
    B,
    BLOCKS,
    scale,
    site,
    threshold,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # BLOCK_N keys against every tile of queries: dV = (P M)^T dO,  dK = scale dS^T Q
    block, bh = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    b, h = bh // H, bh % H
    start, length = span(cu_ptr, b, B, T)
    row = start.to(tl.int64)
    dqkv_ptr += row * (3 * H * D) + h * D
    if b == B:
        for part in tl.static_range(1, 3):
            base_ptr = dqkv_ptr + part * H * D
            zero_tail(base_ptr, 3 * H * D, length, block, BLOCKS, BLOCK_N, D, BLOCK_D)
        return
    if block * BLOCK_N >= length:
        return
    qkv_ptr += row * (3 * H * D) + h * D
    dout_ptr += row * (H * D) + h * D
    lse_ptr += h.to(tl.int64) * T + row
    delta_ptr += h.to(tl.int64) * T + row
    drop = None
    if seed_ptr is not None:
        drop = (tl.load(seed_ptr), bh, site, threshold)
    j0 = block * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_tile(qkv_ptr + H * D, j, 3 * H * D, length, D, BLOCK_D)
    v = load_tile(qkv_ptr + 2 * H * D, j, 3 * H * D, length, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin = 0
    if CAUSAL:
        begin = (j0 // BLOCK_M) * BLOCK_M
    for i0 in range(begin, length, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        q = load_tile(qkv_ptr, i, 3 * H * D, length, D, BLOCK_D)
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
            CAUSAL,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )
        dv = dot(tl.trans(dropped), do, dv, PRECISION)
        dk = dot(tl.trans(ds), q, dk, PRECISION)
    store_tile(dqkv_ptr + H * D, dk * scale, j, 3 * H * D, length, D, BLOCK_D)
    store_tile(dqkv_ptr + 2 * H * D, dv, j, 3 * H * D, length, D, BLOCK_D)


@triton.jit(do_not_specialize=_VARYING)
def _attention_bwd_dq_kernel(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, 3, H, D)
    lse_ptr,  # (H, T)
    delta_ptr,  # (H, T)
    cu_ptr,  # (B + 1,)
    dqkv_ptr,  # (T, 3, H, D)
    seed_ptr,  # (1,), or None
    T,
    B,
    BLOCKS,
    scale,
    site,
    threshold,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # BLOCK_M queries against every tile of keys: dQ = scale dS K
    block, bh = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    b, h = bh // H, bh % H
    start, length = span(cu_ptr, b, B, T)
    row = start.to(tl.int64)
    dqkv_ptr += row * (3 * H * D) + h * D
    if b == B:
        zero_tail(dqkv_ptr, 3 * H * D, length, block, BLOCKS, BLOCK_M, D, BLOCK_D)
        return
    if block * BLOCK_M >= length:
        return
    qkv_ptr += row * (3 * H * D) + h * D
    at = h.to(tl.int64) * T + row
    drop = None
    if seed_ptr is not None:
        drop = (tl.load(seed_ptr), bh, site, threshold)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_tile(qkv_ptr, i, 3 * H * D, length, D, BLOCK_D)
    do = load_tile(dout_ptr + row * (H * D) + h * D, i, H * D, length, D, BLOCK_D)
    lse = tl.load(lse_ptr + at + i, mask=i < length, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + at + i, mask=i < length, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    stop = length
    if CAUSAL:
        stop = tl.minimum(length, (block + 1) * BLOCK_M)
    for j0 in range(0, stop, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_tile(qkv_ptr + H * D, j, 3 * H * D, length, D, BLOCK_D)
        v = load_tile(qkv_ptr + 2 * H * D, j, 3 * H * D, length, D, BLOCK_D)
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
            CAUSAL,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )
        dq = dot(ds, k, dq, PRECISION)
    store_tile(dqkv_ptr, dq * scale, i, 3 * H * D, length, D, BLOCK_D)


def unsupported(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    causal: bool,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    if qkv.shape[3] > 128:
        return f"the head size is {qkv.shape[3]} and the triton kernel goes up to 128: use the torch backend"
    return unsupported_dtype(qkv=qkv) or unsupported_dropout(p)


def forward(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    causal: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in qkv's dtype and lse (H, T) fp32, empty without `save`; zeros past cu_seqlens[-1]."""
    T, _, H, D = qkv.shape
    B = cu_seqlens.shape[0] - 1
    out = qkv.new_empty(T, H, D)
    lse = qkv.new_empty(H, T if save else 0, dtype=torch.float32)
    if T > 0:
        config = _tiles.attention_fwd(max_seqlen, D, qkv.dtype, _launch.arch(qkv.device), p > 0)
        blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_M))
        seed, site, threshold, keep_scale = dropout_args(p, seed, site)
        _attention_fwd_kernel[(blocks * H * (B + 1),)](
            qkv,
            cu_seqlens,
            out,
            lse if save else None,
            seed,
            T,
            B,
            blocks,
            scale,
            site,
            threshold,
            keep_scale,
            H=H,
            D=D,
            CAUSAL=causal,
            ONE=max_seqlen <= config.BLOCK_N,
            **vars(config),
        )
    return out, lse


def backward(
    dout: Tensor,  # (T, H, D)
    qkv: Tensor,  # (T, 3, H, D)
    out: Tensor,  # (T, H, D)
    lse: Tensor,  # (H, T)
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    causal: bool,
) -> Tensor:
    """dqkv (T, 3, H, D), zeros past cu_seqlens[-1]."""
    T, _, H, D = qkv.shape
    B = cu_seqlens.shape[0] - 1
    dqkv = torch.empty_like(qkv)
    if T == 0:
        return dqkv
    kind = (D, qkv.dtype, _launch.arch(qkv.device), p > 0)
    seed, site, threshold, keep_scale = dropout_args(p, seed, site)
    rest = (scale, site, threshold, keep_scale)
    constants: dict[str, Any] = {"H": H, "D": D, "CAUSAL": causal}
    short = _tiles.attention_bwd(max_seqlen, *kind)
    if short is not None:
        _attention_bwd_kernel[(H * (B + 1),)](
            dout, qkv, out, lse, cu_seqlens, dqkv, seed, T, B, *rest, **constants, **vars(short)
        )
        return dqkv
    delta = torch.empty_like(lse)
    BLOCK_D = _tiles.head_block(D)
    _attention_bwd_delta_kernel[(triton.cdiv(T * H, 64),)](
        dout,
        out,
        delta,
        T * H,
        T,
        H=H,
        D=D,
        BLOCK_M=64,
        BLOCK_D=BLOCK_D,
        num_warps=4,
        **_launch.FUSED,
    )
    inputs = (dout, qkv, lse, delta, cu_seqlens, dqkv, seed, T, B)
    config = _tiles.attention_bwd_dkdv(*kind)
    blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_N))
    _attention_bwd_dkdv_kernel[(blocks * H * (B + 1),)](
        *inputs, blocks, *rest, **constants, **vars(config)
    )
    config = _tiles.attention_bwd_dq(*kind)
    blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_M))
    _attention_bwd_dq_kernel[(blocks * H * (B + 1),)](
        *inputs, blocks, *rest, **constants, **vars(config)
    )
    return dqkv
