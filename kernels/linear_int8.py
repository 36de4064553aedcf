"""linear_int8 in Triton: rows of x rounded to integers, then a product of int8 on tensor cores, summed in int32.

12 bits are two int8 products: q = 16 high + low with high in [-128, 127] and low in [0, 15]. Rows of integers are
padded to 16 bytes: else threads load single bytes, and the product needs more registers than there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.backend.stock import linear_int8 as library
from fastbert.kernels import _launch, _tiles, dense, unsupported_dtype
from fastbert.kernels._configured import configured
from fastbert.kernels._gemm import tile_of
from fastbert.kernels._reduce import sum_rows

# adding and subtracting it rounds a number below 2^22 to the nearest integer, ties to even
_ROUNDING = tl.constexpr(12582912.0)
_SMALLEST = tl.constexpr(2.0**-100)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit(do_not_specialize=["M"])
def _linear_int8_rows_kernel(
    x_ptr,  # (M, K)
    high_ptr,  # (M, WIDTH) int8: q of 8 bits, or q >> 4; 0 from K on
    low_ptr,  # (M, WIDTH) int8: q & 15; None with 8 bits
    a_ptr,  # (M,) fp32
    M,
    K,
    WIDTH,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # m = max |x|,  q = round(x (L / m)),  a = m / L
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = rows.to(tl.int64)[:, None] * K
    # of numbers without a sign the order is that of their bits; inf and NaN are above all others
    largest = tl.zeros((ROWS,), tl.int32)
    for first in range(0, K, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)[None, :]
        x = tl.load(x_ptr + start + cols, mask=(rows < M)[:, None] & (cols < K), other=0.0)
        magnitude = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(magnitude, 1))
    m = largest.to(tl.float32, bitcast=True)
    levels = tl.full((ROWS,), 127.0 if low_ptr is None else 2047.0, tl.float32)
    finite, live = largest < _INFINITY, m >= _SMALLEST
    r = tl.div_rn(levels, tl.where(live, m, 1.0))
    r = tl.where(finite & live, r, 0.0)
    a = tl.where(live, tl.div_rn(m, levels), 0.0)
    tl.store(a_ptr + rows, tl.where(finite, a, float("nan")), mask=rows < M)
    to = rows.to(tl.int64)[:, None] * WIDTH
    for first in range(0, WIDTH, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)[None, :]
        inside = (rows < M)[:, None] & (cols < WIDTH)
        x = tl.load(x_ptr + start + cols, mask=inside & (cols < K), other=0.0).to(tl.float32)
        x = tl.where(finite[:, None], x, 0.0)
        q = ((x * r[:, None] + _ROUNDING) - _ROUNDING).to(tl.int32)
        if low_ptr is None:
            tl.store(high_ptr + to + cols, q.to(tl.int8), mask=inside)
        else:
            tl.store(high_ptr + to + cols, (q >> 4).to(tl.int8), mask=inside)
            tl.store(low_ptr + to + cols, (q & 15).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _linear_int8_fwd_kernel(
    high_ptr,  # (M, K) int8
    low_ptr,  # (M, K) int8, or None
    a_ptr,  # (M,) fp32
    w_ptr,  # (N, K) int8
    s_ptr,  # (N,) fp32
    b_ptr,  # (N,), or None
    y_ptr,  # (M, N)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # y = (16 high + low) w^T a s + bias
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m0, n0 = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        m = m0 + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_at = m.to(tl.int64)[:, None] * K + k[None, :]
        w_at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        rest = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k0 in range(0, K, BLOCK_K):
            left = (k0 + k < K)[None, :]
            rows = (m < M)[:, None] & left
            w = tl.trans(tl.load(w_at + k0, mask=(n < N)[:, None] & left, other=0))
            total = tl.dot(tl.load(high_ptr + x_at + k0, mask=rows, other=0), w, total)
            if low_ptr is not None:
                rest = tl.dot(tl.load(low_ptr + x_at + k0, mask=rows, other=0), w, rest)
        if low_ptr is not None:
            # 16 total may leave 32 bits and comes back: the sum fits
            total = (total << 4) + rest
        y = total.to(tl.float32) * tl.load(a_ptr + m, mask=m < M, other=0.0)[:, None]
        y *= tl.load(s_ptr + n, mask=n < N, other=0.0)[None, :]
        if b_ptr is not None:
            y += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(y_ptr + at, y, mask=(m < M)[:, None] & (n < N)[None, :])


# Multiply-adds are not fused: x r is rounded before it is rounded to an integer, and results are those of a CPU.
@dataclass(frozen=True)
class _Tiles:
    """Output tiles of BLOCK_M x BLOCK_N in steps of BLOCK_K; GROUP rows of tiles share the columns of w in L2."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = False


@configured()
def _linear_int8_gemm(M: int, N: int, bits: int, arch: _launch.Arch) -> _Tiles:
    """Large tiles if they are enough to fill the device, else small ones; 12 bits keep two sums."""
    stages = 2 if isinstance(arch, str) else 3
    if min(M, N) <= 64:
        return _Tiles(_tiles.tile(M, 64), 32, 128, 8, 4, stages)
    if M * N <= 1024 * 1024 or bits == 12:
        # two sums in four warps leave no register free there
        full = bits == 12 and arch in (80, 100)
        return _Tiles(64, 128, 64, 8, 8 if full else 4, stages)
    return _Tiles(128, 128, 64, 8, 8, stages)


@configured()
def _linear_int8_rows(width: int, arch: _launch.Arch) -> _launch.Rows:
    """One warp for a block of up to 1024 elements; a row wider than 4096 takes several blocks."""
    block = min(4096, max(16, triton.next_power_of_2(width)))
    return _launch.Rows(1, block, max(1, min(4, block // 1024)), enable_fp_fusion=False)


def unsupported(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    bias: Tensor | None,  # (N,)
    bits: int,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(x=x, scale=scale, bias=bias)


def forward(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    bias: Tensor | None,  # (N,)
    bits: int,
) -> Tensor:
    """y (T, N) in x's dtype."""
    (T, K), N, arch = x.shape, weight.shape[0], _launch.arch(x.device)
    y = x.new_empty(T, N)
    if y.numel() == 0:
        return y
    width = 16 * triton.cdiv(K, 16)
    padded = weight if width == K else torch.nn.functional.pad(weight, (0, width - K))
    high = x.new_empty(T, width, dtype=torch.int8)
    low = torch.empty_like(high) if bits == 12 else None
    a = x.new_empty(T, dtype=torch.float32)
    rows = _linear_int8_rows(K, arch)
    _linear_int8_rows_kernel[(triton.cdiv(T, rows.ROWS),)](
        x, high, low, a, T, K, width, **vars(rows)
    )
    config = _linear_int8_gemm(_tiles.tile(T, 8192), N, bits, arch)
    tiles = triton.cdiv(T, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    _linear_int8_fwd_kernel[(min(tiles, _launch.multiprocessors(x.device)),)](
        high,
        low,
        a,
        dense(padded),
        dense(scale),
        dense(bias),
        y,
        T,
        N,
        width,
        **vars(config),
    )
    return y


def backward(
    dy: Tensor,  # (T, N)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    needs: Sequence[bool],  # for x, bias
) -> tuple[Tensor, Tensor]:
    """dx (T, K) in dy's dtype, dbias (N,) fp32; empty where not needed."""
    dx, dbias = library.backward(dy, weight, scale, [needs[0], False])
    return dx, sum_rows(dy) if needs[1] else dbias
