"""rms_norm in Triton: rows in registers, fp32 statistics, a persistent backward with a deterministic sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _launch, dense, unsupported_dtype, unsupported_width
from fastbert.kernels._reduce import sum_partials
from fastbert.kernels._rows import load_vector


@triton.jit(do_not_specialize=["N"])
def _rms_norm_fwd_kernel(
    x_ptr,  # (N, C)
    weight_ptr,  # (C,), or None
    y_ptr,  # (N, C)
    rstd_ptr,  # (N,)
    N,
    C: tl.constexpr,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # y = x rstd weight
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= load_vector(weight_ptr, cols, C)
    tl.store(y_ptr + at, y, mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def _rms_norm_bwd_kernel(
    dy_ptr,  # (N, C)
    x_ptr,  # (N, C)
    weight_ptr,  # (C,), or None
    rstd_ptr,  # (N,)
    dx_ptr,  # (N, C)
    partial_ptr,  # (1, programs, C) fp32, or None
    N,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    # dx = rstd (g - xhat mean(g xhat)) with g = dy weight. Each program takes every programs-th group of rows and
    # stores its sum of dy xhat
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_C)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    weight = load_vector(weight_ptr, cols, C) if weight_ptr is not None else 1.0
    for first in tl.range(program * ROWS, N, programs * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & (cols < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]
        xhat, g = x * rstd, dy * weight
        along = tl.sum(g * xhat, 1) / C
        tl.store(dx_ptr + at, rstd * (g - xhat * along[:, None]), mask=inside)
        dweight += dy * xhat
    if partial_ptr is not None:
        tl.store(partial_ptr + program * C + cols, tl.sum(dweight, 0), mask=cols < C)


def unsupported(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    eps: float,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(x=x, weight=weight) or unsupported_width(x.shape[1])


def forward(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y (N, C) in x's dtype, rstd (N,) fp32."""
    N, C = x.shape
    y = torch.empty_like(x)
    rstd = x.new_empty(N, dtype=torch.float32)
    if N > 0:
        config = _launch.rows(C, _launch.arch(x.device))
        _rms_norm_fwd_kernel[(triton.cdiv(N, config.ROWS),)](
            x, dense(weight), y, rstd, N, C, eps, **vars(config)
        )
    return y, rstd


def backward(
    dy: Tensor,  # (N, C)
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    rstd: Tensor,  # (N,) fp32
) -> tuple[Tensor, Tensor]:
    """dx (N, C) in x's dtype and dweight (C,) in weight's, which is empty where there is no weight."""
    N, C = x.shape
    dx = torch.empty_like(x)
    if N == 0:
        return dx, dy.new_empty(0) if weight is None else torch.zeros_like(weight)
    config = _launch.persistent_rows(C, _launch.arch(x.device))
    programs = _launch.programs(N, config, x.device)
    partial = None if weight is None else x.new_empty(1, programs, C, dtype=torch.float32)
    _rms_norm_bwd_kernel[(programs,)](dy, x, dense(weight), rstd, dx, partial, N, C, **vars(config))
    if weight is None or partial is None:
        return dx, dy.new_empty(0)
    return dx, *sum_partials(partial, weight.dtype)
