"""A persistent Triton GEMM: y = x w^T + bias for one to three weights, and gelu(y).

It reads separate weights in place if BLOCK_N divides their rows, and casts fp32 weights while it reads them. gelu
is in its epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _launch, _tiles, dense
from fastbert.kernels._math import gelu_and_derivative


@triton.jit
def tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of an output tile; GROUP rows of tiles reuse the columns of w while they are in L2."""
    height = tl.cdiv(M, BLOCK_M)
    group = GROUP * tl.cdiv(N, BLOCK_N)
    top = tile // group * GROUP
    tall = tl.minimum(height - top, GROUP)
    return (top + tile % group % tall) * BLOCK_M, tile % group // tall * BLOCK_N


@triton.jit(do_not_specialize=["M"])
def _linear_fwd_kernel(
    x_ptr,  # (M, K)
    w0_ptr,  # (PIECE, K)
    w1_ptr,  # (PIECE, K), or None if there is one weight
    w2_ptr,
    b0_ptr,  # (PIECE,), or None
    b1_ptr,
    b2_ptr,
    y_ptr,  # (M, N), or None
    h_ptr,  # (M, N): gelu(y); or None
    M,
    N,
    K,
    PIECE,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # y = x w^T + bias,  h = gelu(y); each tile lies within one weight
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m0, n0 = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        w_ptr, b_ptr, local = w0_ptr, b0_ptr, n0
        if w1_ptr is not None:
            piece = n0 // PIECE
            local = n0 - piece * PIECE
            w_ptr = tl.where(piece == 0, w0_ptr, tl.where(piece == 1, w1_ptr, w2_ptr))
            if b0_ptr is not None:
                b_ptr = tl.where(piece == 0, b0_ptr, tl.where(piece == 1, b1_ptr, b2_ptr))
        m = m0 + tl.arange(0, BLOCK_M)
        n = local + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_at = x_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
        w_at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            left = (k0 + k < K)[None, :]
            x = tl.load(x_at + k0, mask=(m < M)[:, None] & left, other=0.0)
            w = tl.load(w_at + k0, mask=(n < PIECE)[:, None] & left, other=0.0)
            acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision=PRECISION)
        if b0_ptr is not None:
            acc += tl.load(b_ptr + n, mask=n < PIECE, other=0.0).to(tl.float32)[None, :]
        at = m.to(tl.int64)[:, None] * N + (n0 + tl.arange(0, BLOCK_N))[None, :]
        inside = (m < M)[:, None] & (n < PIECE)[None, :]
        if y_ptr is not None:
            tl.store(y_ptr + at, acc, mask=inside)
        if h_ptr is not None:
            h, _ = gelu_and_derivative(acc, TANH, x_ptr.dtype.element_ty.primitive_bitwidth == 16)
            tl.store(h_ptr + at, h, mask=inside)


def _three(parts: Sequence[Tensor]) -> list[Tensor | None]:
    """The kernel's three arguments for up to three tensors. The third is never read where there are two."""
    given: list[Tensor | None] = [dense(t) for t in parts]
    if len(given) == 2:
        return [*given, given[1]]
    return given + [None] * (3 - len(given))


def project(
    x: Tensor,  # (T, K)
    weights: Sequence[Tensor],  # one (N, K), or two or three with as many rows each
    biases: Sequence[Tensor],  # likewise, or none
    approximate: str | None = None,
    product: bool = True,
) -> tuple[Tensor, Tensor]:
    """y (T, N), empty without `product`, and gelu(y) (T, N), empty without `approximate`, in x's dtype."""
    (T, K), piece = x.shape, weights[0].shape[0]
    N = piece * len(weights)
    config = _tiles.gemm(_tiles.tile(T, 8192), N, x.dtype, _launch.arch(x.device))
    if len(weights) > 1 and piece % config.BLOCK_N:
        weights, biases = [torch.cat(list(weights))], [torch.cat(list(biases))] if biases else []
        piece = N
    y = x.new_empty(T if product else 0, N)
    h = x.new_empty(T if approximate else 0, N)
    tiles = triton.cdiv(T, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    if tiles > 0:
        _linear_fwd_kernel[(min(tiles, _launch.multiprocessors(x.device)),)](
            x,
            *_three(weights),
            *_three(biases),
            y if product else None,
            h if approximate else None,
            T,
            N,
            K,
            piece,
            TANH=approximate == "tanh",
            **vars(config),
        )
    return y, h
