"""dropout_add_layer_norm in Triton: one pass each way; backward replays the dropout mask from its seed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import (
    _launch,
    dense,
    dropout_args,
    unsupported_dropout,
    unsupported_dtype,
    unsupported_width,
)
from fastbert.kernels._math import moments
from fastbert.kernels._reduce import sum_partials
from fastbert.kernels._rows import drop_rows, load_vector, row_gradient, store_sums


@triton.jit
def _numbers(numbers_ptr, rows, N):
    """The absolute row numbers for dropout: numbers[rows], or rows themselves."""
    numbers = rows.to(tl.uint32)
    if numbers_ptr is not None:
        numbers = tl.load(numbers_ptr + rows, mask=rows < N, other=0).to(tl.uint32)
    return numbers


@triton.jit(do_not_specialize=["N", "site", "threshold"])
def _dropout_add_layer_norm_fwd_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,), or None
    y_ptr,  # (N, C)
    z_ptr,  # (N, C), or None
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    seed_ptr,  # (1,), or None
    numbers_ptr,  # (N,), or None
    N,
    C: tl.constexpr,
    eps,
    site,
    threshold,
    scale,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # z = residual + dropout(x),  y = (z - mean) rstd weight + bias
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    numbers = _numbers(numbers_ptr, rows, N)
    wide: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    z = drop_rows(z, inside, seed_ptr, numbers, site, threshold, scale, ROWS, BLOCK_C, wide)
    z += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + at, z, mask=inside)
    centred, mean, rstd = moments(z, inside, C, eps)
    y = centred * rstd[:, None] * load_vector(weight_ptr, cols, C)
    if bias_ptr is not None:
        y += load_vector(bias_ptr, cols, C)
    tl.store(y_ptr + at, y, mask=inside)
    tl.store(mean_ptr + rows, mean, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit(do_not_specialize=["N", "site", "threshold"])
def _dropout_add_layer_norm_bwd_kernel(
    dy_ptr,  # (N, C)
    z_ptr,  # (N, C), or y where there is a bias
    weight_ptr,  # (C,)
    bias_ptr,  # (C,), or None
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    dz_ptr,  # (N, C), or None
    dx_ptr,  # (N, C)
    dresidual_ptr,  # (N, C)
    partial_ptr,  # (2, programs, C) fp32
    seed_ptr,  # (1,), or None
    numbers_ptr,  # (N,), or None
    N,
    C: tl.constexpr,
    site,
    threshold,
    scale,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    # dsum is LayerNorm's gradient + dz, dresidual = dsum, dx = dropout(dsum); sums of dy xhat and dy as in layer_norm
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_C)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    weight = load_vector(weight_ptr, cols, C)
    bias = load_vector(bias_ptr, cols, C) if bias_ptr is not None else None
    wide: tl.constexpr = z_ptr.dtype.element_ty.primitive_bitwidth == 16
    for first in tl.range(program * ROWS, N, programs * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & (cols < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dsum, xhat = row_gradient(g, z, weight, bias, mean_ptr, rstd_ptr, rows, inside, N, C)
        dweight += g * xhat
        dbias += g
        if dz_ptr is not None:
            dsum += tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + at, dsum, mask=inside)
        numbers = _numbers(numbers_ptr, rows, N)
        dx = drop_rows(dsum, inside, seed_ptr, numbers, site, threshold, scale, ROWS, BLOCK_C, wide)
        tl.store(dx_ptr + at, dx, mask=inside)
    store_sums(partial_ptr, dweight, dbias, cols, C)


def unsupported(
    x: Tensor,  # (N, C)
    residual: Tensor,  # (N, C)
    weight: Tensor,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    rows: Tensor | None,  # (N,) int64
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return (
        unsupported_dtype(x=x, weight=weight, bias=bias)
        or unsupported_width(x.shape[1])
        or unsupported_dropout(p)
    )


def forward(
    x: Tensor,  # (N, C)
    residual: Tensor,  # (N, C)
    weight: Tensor,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    rows: Tensor | None,  # (N,) int64
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (N, C) and z (N, C) in x's dtype, mean and rstd (N,) fp32; z is (0, C) unless `save`."""
    N, C = x.shape
    y = torch.empty_like(x)
    z = torch.empty_like(x) if save else x.new_empty(0, C)
    mean, rstd = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    if N > 0:
        config = _launch.rows(C, _launch.arch(x.device))
        seed, site, threshold, scale = dropout_args(p, seed, site)
        _dropout_add_layer_norm_fwd_kernel[(triton.cdiv(N, config.ROWS),)](
            x,
            residual,
            dense(weight),
            dense(bias),
            y,
            z if save else None,
            mean,
            rstd,
            seed,
            dense(rows),
            N,
            C,
            eps,
            site,
            threshold,
            scale,
            **vars(config),
        )
    return y, z, mean, rstd


def backward(
    dy: Tensor,  # (N, C)
    z: Tensor,  # (N, C), or y where bias is given
    weight: Tensor,  # (C,)
    mean: Tensor,  # (N,) fp32
    rstd: Tensor,  # (N,) fp32
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    rows: Tensor | None,  # (N,) int64
    bias: Tensor | None = None,  # (C,)
    dz: Tensor | None = None,  # (N, C): the gradient that reaches z itself
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dresidual (N, C) in z's dtype, dweight (C,) in weight's and dbias in fp32."""
    N, C = z.shape
    dx, dresidual = torch.empty_like(z), torch.empty_like(z)
    if N == 0:
        return dx, dresidual, torch.zeros_like(weight), z.new_zeros(C, dtype=torch.float32)
    reads = 2 if dz is None else 3
    config = _launch.persistent_rows(C, _launch.arch(z.device), False, reads)
    programs = _launch.programs(N, config, z.device)
    partial = z.new_empty(2, programs, C, dtype=torch.float32)
    seed, site, threshold, scale = dropout_args(p, seed, site)
    _dropout_add_layer_norm_bwd_kernel[(programs,)](
        dy,
        z,
        dense(weight),
        dense(bias),
        mean,
        rstd,
        dz,
        dx,
        dresidual,
        partial,
        seed,
        dense(rows),
        N,
        C,
        site,
        threshold,
        scale,
        **vars(config),
    )
    return dx, dresidual, *sum_partials(partial, weight.dtype, torch.float32)
