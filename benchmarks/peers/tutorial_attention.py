"""Attention as Triton's tutorial describes it (FlashAttention-2 over a dense batch), for comparison only.

Written from the description, not from its code: one program for BLOCK_M queries of a head, an online softmax in base 2
forward; backward a pass for delta, one for dK and dV, one for dQ. No padding, no dropout: every sequence has S tokens,
a multiple of the tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# the tutorial's tiles for a head size of 64 on Ampere and Hopper
FORWARD = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
BACKWARD = {"num_warps": 4, "num_stages": 3}
LOG2E = 1.4426950408889634


@triton.jit
def _rows(base, first, S, BLOCK: tl.constexpr, D: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    return base + at[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def _tutorial_fwd_kernel(
    q_ptr,  # (B, H, S, D)
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # (B, H, S), in base 2
    S,
    scale,  # in base 2
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base = head * S * D
    q = tl.load(_rows(q_ptr + base, block * BLOCK_M, S, BLOCK_M, D))
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for first in range(0, S, BLOCK_N):
        k = tl.load(_rows(k_ptr + base, first, S, BLOCK_N, D))
        s = tl.dot(q, tl.trans(k)) * scale
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - top[:, None])
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(_rows(v_ptr + base, first, S, BLOCK_N, D))
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        m = top
    out = acc / total[:, None]
    tl.store(_rows(out_ptr + base, block * BLOCK_M, S, BLOCK_M, D), out.to(q.dtype))
    at = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head * S + at, m + tl.log2(total))


@triton.jit
def _tutorial_delta_kernel(out_ptr, dout_ptr, delta_ptr, D: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    out = tl.load(_rows(out_ptr, first, 0, BLOCK, D)).to(tl.float32)
    dout = tl.load(_rows(dout_ptr, first, 0, BLOCK, D)).to(tl.float32)
    tl.store(delta_ptr + first + tl.arange(0, BLOCK), tl.sum(out * dout, 1))


@triton.jit
def _tutorial_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    S,
    scale,  # in base 2
    factor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base = head * S * D
    k = tl.load(_rows(k_ptr + base, block * BLOCK_N, S, BLOCK_N, D))
    v = tl.load(_rows(v_ptr + base, block * BLOCK_N, S, BLOCK_N, D))
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for first in range(0, S, BLOCK_M):
        at = head * S + first + tl.arange(0, BLOCK_M)
        q = tl.load(_rows(q_ptr + base, first, S, BLOCK_M, D))
        dout = tl.load(_rows(dout_ptr + base, first, S, BLOCK_M, D))
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - tl.load(lse_ptr + at)[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        ds = p * (tl.dot(v, tl.trans(dout)) - tl.load(delta_ptr + at)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    tl.store(_rows(dk_ptr + base, block * BLOCK_N, S, BLOCK_N, D), (dk * factor).to(k.dtype))
    tl.store(_rows(dv_ptr + base, block * BLOCK_N, S, BLOCK_N, D), dv.to(k.dtype))


@triton.jit
def _tutorial_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    S,
    scale,  # in base 2
    factor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base = head * S * D
    q = tl.load(_rows(q_ptr + base, block * BLOCK_M, S, BLOCK_M, D))
    dout = tl.load(_rows(dout_ptr + base, block * BLOCK_M, S, BLOCK_M, D))
    at = head * S + block * BLOCK_M + tl.arange(0, BLOCK_M)
    lse, delta = tl.load(lse_ptr + at)[:, None], tl.load(delta_ptr + at)[:, None]
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for first in range(0, S, BLOCK_N):
        k = tl.load(_rows(k_ptr + base, first, S, BLOCK_N, D))
        v = tl.load(_rows(v_ptr + base, first, S, BLOCK_N, D))
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse)
        ds = p * (tl.dot(dout, tl.trans(v)) - delta)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    tl.store(_rows(dq_ptr + base, block * BLOCK_M, S, BLOCK_M, D), (dq * factor).to(q.dtype))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, S, D = q.shape
        out, lse = torch.empty_like(q), q.new_empty(B, H, S, dtype=torch.float32)
        _tutorial_fwd_kernel[(S // FORWARD["BLOCK_M"], B * H)](
            q, k, v, out, lse, S, D**-0.5 * LOG2E, D=D, **FORWARD
        )
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        B, H, S, D = q.shape
        dout, delta = dout.contiguous(), torch.empty_like(lse)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        _tutorial_delta_kernel[(B * H * S // 128,)](out, dout, delta, D=D, BLOCK=128)
        factor = D**-0.5
        last = (S, factor * LOG2E, factor)
        inputs = (q, k, v, dout, lse, delta)
        _tutorial_dkdv_kernel[(S // 128, B * H)](
            *inputs, dk, dv, *last, D=D, BLOCK_M=32, BLOCK_N=128, **BACKWARD
        )
        _tutorial_dq_kernel[(S // 128, B * H)](
            *inputs, dq, *last, D=D, BLOCK_M=128, BLOCK_N=32, **BACKWARD
        )
        return dq, dk, dv


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax of q k^T / sqrt(D) times v, all contiguous (B, H, S, D), S a multiple of 128."""
    return _Attention.apply(q, k, v)
