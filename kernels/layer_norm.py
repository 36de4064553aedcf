"""layer_norm in Triton: rows in registers, centred fp32 statistics, a persistent backward with deterministic sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _launch, dense, unsupported_dtype, unsupported_width
from fastbert.kernels._math import moments
from fastbert.kernels._reduce import sum_partials
from fastbert.kernels._rows import load_vector, row_gradient, store_sums


@triton.jit(do_not_specialize=["N"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (N, C)
    weight_ptr,  # (C,), or None
    bias_ptr,  # (C,), or None
    y_ptr,  # (N, C)
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    N,
    C: tl.constexpr,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # y = (x - mean) rstd weight + bias
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    centred, mean, rstd = moments(x, inside, C, eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= load_vector(weight_ptr, cols, C)
    if bias_ptr is not None:
        y += load_vector(bias_ptr, cols, C)
    tl.store(y_ptr + at, y, mask=inside)
    tl.store(mean_ptr + rows, mean, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # (N, C)
    x_ptr,  # (N, C), or y where there is a bias
    weight_ptr,  # (C,), or None
    bias_ptr,  # (C,), or None
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    dx_ptr,  # (N, C)
    partial_ptr,  # (2, programs, C) fp32, or None
    N,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    # each program takes every programs-th group of rows and stores its sums of dy xhat and dy
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_C)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    weight = load_vector(weight_ptr, cols, C) if weight_ptr is not None else 1.0
    bias = load_vector(bias_ptr, cols, C) if bias_ptr is not None else None
    for first in tl.range(program * ROWS, N, programs * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & (cols < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx, xhat = row_gradient(g, x, weight, bias, mean_ptr, rstd_ptr, rows, inside, N, C)
        tl.store(dx_ptr + at, dx, mask=inside)
        dweight += g * xhat
        dbias += g
    if partial_ptr is not None:
        store_sums(partial_ptr, dweight, dbias, cols, C)


def unsupported(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(x=x, weight=weight, bias=bias) or unsupported_width(x.shape[1])


def forward(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, C) in x's dtype, mean and rstd (N,) fp32."""
    N, C = x.shape
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    if N > 0:
        config = _launch.rows(C, _launch.arch(x.device))
        _layer_norm_fwd_kernel[(triton.cdiv(N, config.ROWS),)](
            x, dense(weight), dense(bias), y, mean, rstd, N, C, eps, **vars(config)
        )
    return y, mean, rstd


def backward(
    dy: Tensor,  # (N, C)
    x: Tensor,  # (N, C), or y where bias is given
    weight: Tensor | None,  # (C,)
    mean: Tensor,  # (N,) fp32
    rstd: Tensor,  # (N,) fp32
    bias: Tensor | None = None,  # (C,)
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, C) in x's dtype, dweight (C,) in weight's and dbias in fp32; both are empty without a weight."""
    N, C = x.shape
    dx = torch.empty_like(x)
    if N == 0:
        if weight is None:
            return dx, dy.new_empty(0), dy.new_empty(0)
        return dx, torch.zeros_like(weight), x.new_zeros(C, dtype=torch.float32)
    config = _launch.persistent_rows(C, _launch.arch(x.device))
    programs = _launch.programs(N, config, x.device)
    partial = None if weight is None else x.new_empty(2, programs, C, dtype=torch.float32)
    _layer_norm_bwd_kernel[(programs,)](
        dy, x, dense(weight), dense(bias), mean, rstd, dx, partial, N, C, **vars(config)
    )
    if weight is None or partial is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    return dx, *sum_partials(partial, weight.dtype, torch.float32)
