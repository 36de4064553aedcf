"""attention in Triton: packed sequences, exact softmax, dropout replayed by absolute index, only tiles in the window.

A program takes BLOCK_M queries of one (sequence, head). Sequence number B stands for the rows past cu_seqlens[-1],
which are zeroed and never read. backward has no atomics. If the keys of a whole sequence fit a tile
(_tiles.attention_bwd), one kernel makes all five products; else one makes dK and dV, and another dQ. Rotary positions
are passes before and after (_rope.py); the gradient of a bias has a kernel of its own (_attention_dbias.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.backend.reference.attention_form import sizes
from fastbert.kernels import _launch, _tiles, dropout_args, unsupported_dropout, unsupported_dtype
from fastbert.kernels._attend import (
    VARYING,
    attend,
    head_bias,
    load_tile,
    seen,
    span,
    store_tile,
    zero_tail,
)
from fastbert.kernels._attention_bwd import (
    _attention_bwd_delta_kernel,
    _attention_bwd_dkdv_kernel,
    _attention_bwd_dq_kernel,
    _attention_bwd_kernel,
)
from fastbert.kernels._attention_dbias import bias_gradient
from fastbert.kernels._math import LN2, LOG2E
from fastbert.kernels._rope import rotate

LOWEST = tl.constexpr(-3e38)


@triton.jit(do_not_specialize=VARYING)
def _attention_fwd_kernel(
    qkv_ptr,  # (T, H + 2 KV, D)
    cu_ptr,  # (B + 1,)
    out_ptr,  # (T, H, D)
    lse_ptr,  # (H, T), or None
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
    ONE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # m: running maximum of the scores in base 2; total: sum of powers; out = acc / total, lse = ln 2 (m + log2 total)
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
    STRIDE: tl.constexpr = (H + 2 * KV) * D
    qkv_ptr += row * STRIDE
    q = load_tile(qkv_ptr + h * D, i, STRIDE, length, D, BLOCK_D)
    k_ptr = qkv_ptr + (H + h // (H // KV)) * D
    v_ptr = k_ptr + KV * D
    drop = None
    if seed_ptr is not None:
        drop = (tl.load(seed_ptr), bh, site, threshold)
    bias = head_bias(bias_ptr, h, P)
    # a finite maximum: the first tile may lie outside the windows of some queries
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # first the tiles without masked keys, then the others; a window to the left leaves few of the first kind
    begin, stop = seen(block * BLOCK_M, BLOCK_M, length, LEFT, RIGHT, BLOCK_N)
    whole = length // BLOCK_N * BLOCK_N
    if RIGHT >= 0:
        whole = tl.minimum(length, block * BLOCK_M + RIGHT + 1) // BLOCK_N * BLOCK_N
    if LEFT >= 0:
        whole = begin
    if ONE:
        # all keys are in one tile: no running maximum
        whole, stop = 0, 1
    elif LEFT < 0:
        for j0 in range(0, whole, BLOCK_N):
            m, total, acc = attend(
                q,
                k_ptr,
                v_ptr,
                i,
                j0,
                length,
                (m, total, acc),
                scale * LOG2E,
                drop,
                bias,
                False,
                LEFT,
                RIGHT,
                PRECISION,
                ONE,
                STRIDE,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
    for j0 in range(whole, stop, BLOCK_N):
        m, total, acc = attend(
            q,
            k_ptr,
            v_ptr,
            i,
            j0,
            length,
            (m, total, acc),
            scale * LOG2E,
            drop,
            bias,
            True,
            LEFT,
            RIGHT,
            PRECISION,
            ONE,
            STRIDE,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
    store_tile(out_ptr, acc * (keep_scale / total)[:, None], i, H * D, length, D, BLOCK_D)
    if lse_ptr is not None:
        lse_ptr += h.to(tl.int64) * T + row
        tl.store(lse_ptr + i, (m + tl.log2(total)) * LN2, mask=i < length)


def _window(left: int, right: int, max_seqlen: int) -> dict[str, int]:
    """The bounds as constants of the kernels; -1, no bound, in the place of a bound that hides no key."""
    last = max_seqlen - 1
    return {"LEFT": left if left < last else -1, "RIGHT": right if right < last else -1}


def unsupported(
    qkv: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,
    pairs: bool,
    bias: Tensor | None,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    if qkv.shape[-1] > 128:
        return f"the head size is {qkv.shape[-1]} and the triton kernel goes up to 128: use the torch backend"
    if not scale > 0:
        return f"the scale is {scale} and the triton kernel needs a positive one: use the torch backend"
    return unsupported_dtype(qkv=qkv) or unsupported_dropout(p)


def forward(
    qkv: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,
    pairs: bool,
    bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in qkv's dtype and lse (H, T) fp32, empty without `save`; zeros past cu_seqlens[-1]."""
    T, (H, _, D) = qkv.shape[0], sizes(qkv, kv_heads)
    B = cu_seqlens.shape[0] - 1
    out = qkv.new_empty(T, H, D)
    lse = qkv.new_empty(H, T if save else 0, dtype=torch.float32)
    if T > 0:
        if rotary is not None:
            place = (cu_seqlens, max_seqlen, kv_heads, rotary, pairs)
            qkv = rotate(qkv, torch.empty_like(qkv), *place)
        length = _tiles.tile(max_seqlen, 512)
        config = _tiles.attention_fwd(length, D, qkv.dtype, _launch.arch(qkv.device), p > 0)
        blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_M))
        seed, site, threshold, keep_scale = dropout_args(p, seed, site)
        _attention_fwd_kernel[(blocks * H * (B + 1),)](
            qkv,
            cu_seqlens,
            out,
            lse if save else None,
            seed,
            bias,
            T,
            B,
            _positions(bias),
            blocks,
            scale,
            site,
            threshold,
            keep_scale,
            H=H,
            KV=kv_heads,
            D=D,
            **_window(left, right, max_seqlen),
            ONE=max_seqlen <= config.BLOCK_N,
            **vars(config),
        )
    return out, lse


def backward(
    dout: Tensor,  # (T, H, D)
    qkv: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
    out: Tensor,  # (T, H, D)
    lse: Tensor,  # (H, T)
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,
    pairs: bool,
    bias: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dqkv like qkv, zeros past cu_seqlens[-1], and dbias like bias, or empty."""
    T, (H, _, D) = qkv.shape[0], sizes(qkv, kv_heads)
    B = cu_seqlens.shape[0] - 1
    dqkv, dbias = torch.empty_like(qkv), qkv.new_empty(0)
    if T == 0:
        return dqkv, torch.zeros_like(bias) if bias is not None and needs_bias else dbias
    if rotary is not None:
        place = (cu_seqlens, max_seqlen, kv_heads, rotary, pairs)
        qkv = rotate(qkv, torch.empty_like(qkv), *place)
    kind = (D, qkv.dtype, _launch.arch(qkv.device), p > 0)
    seed, *drop = dropout_args(p, seed, site)
    rest, more = (scale, *drop), (dqkv, seed, bias, T, B, _positions(bias))
    constants = {"H": H, "D": D, **_window(left, right, max_seqlen)}
    short = None
    if kv_heads == H:
        # only the loops add the gradients of several query heads to a key head's
        short = _tiles.attention_bwd(_tiles.tile(max_seqlen, 512), *_with_bias(kind, bias))
    if short is not None:
        _attention_bwd_kernel[(H * (B + 1),)](
            dout, qkv, lse, cu_seqlens, *more, *rest, **constants, **vars(short)
        )
    constants["KV"] = kv_heads
    if short is None or needs_bias:
        inputs = (dout, qkv, lse, _delta(dout, out), cu_seqlens)
        if short is None:
            _loops((*inputs, *more), max_seqlen, rest, constants, kind)
        if bias is not None and needs_bias:
            dbias = bias_gradient(*inputs, seed, bias, rest, constants, kind)
    if rotary is not None:
        rotate(dqkv, dqkv, *place, back=True)
    return dqkv, dbias


def _positions(bias: Tensor | None) -> int:
    """P of a bias (H, 2 P - 1), 0 without one."""
    return 0 if bias is None else bias.shape[1] // 2 + 1


def _with_bias(kind: tuple[Any, ...], bias: Tensor | None) -> tuple[Any, ...]:
    """The arguments of a configuration that depends on a bias; without one those that tune() has stored results for."""
    return kind if bias is None else (*kind, True)


def _delta(dout: Tensor, out: Tensor) -> Tensor:
    """The sums of dout * out over the head size, (H, T) fp32."""
    T, H, D = out.shape
    delta = out.new_empty(H, T, dtype=torch.float32)
    sizes = {"H": H, "D": D, "BLOCK_M": 64, "BLOCK_D": _tiles.head_block(D)}
    _attention_bwd_delta_kernel[(triton.cdiv(T * H, 64),)](
        dout, out, delta, T * H, T, **sizes, num_warps=4, **_launch.FUSED
    )
    return delta


def _loops(
    inputs: tuple[Any, ...],  # of both kernels: dout to P
    max_seqlen: int,
    rest: tuple[Any, ...],  # scale, site, threshold, keep_scale
    constants: dict[str, int],
    kind: tuple[Any, ...],  # D, dtype, architecture, whether there is dropout
) -> None:
    """Launch the kernel that writes dK and dV, and the one that writes dQ."""
    (*_, bias, _, B, _), H, KV = inputs, constants["H"], constants["KV"]
    kind = _with_bias(kind, bias)
    config = _tiles.attention_bwd_dkdv(*kind)
    blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_N))
    _attention_bwd_dkdv_kernel[(blocks * KV * (B + 1),)](
        *inputs, blocks, *rest, **constants, **vars(config)
    )
    config = _tiles.attention_bwd_dq(*kind)
    blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_M))
    _attention_bwd_dq_kernel[(blocks * H * (B + 1),)](
        *inputs, blocks, *rest, **constants, **vars(config)
    )
