"""dropout_add_layer_norm on the CUDA kernels, csrc/cuda/dropout_add_layer_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cuda import (
    DTYPES,
    address,
    code,
    dropout_args,
    int64,
    native,
    parameter,
    place,
    row_partials,
    unsupported_dropout,
    unsupported_dtype,
    unsupported_width,
)
from fastbert.backend.reference.layer_norm import rebuilt


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
        scale, shift, numbers = parameter(weight, x.dtype), parameter(bias, x.dtype), int64(rows)
        native.dropout_add_layer_norm_fwd(
            DTYPES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            address(scale),
            code(scale),
            address(shift),
            code(shift),
            y.data_ptr(),
            z.data_ptr() if save else 0,
            mean.data_ptr(),
            rstd.data_ptr(),
            *dropout_args(p, seed, site),
            address(numbers),
            N,
            C,
            eps,
            *place(x),
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
    z = rebuilt(z, weight, bias, mean, rstd)
    N, C = z.shape
    dx, dresidual = torch.empty_like(z), torch.empty_like(z)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = z.new_empty(C, dtype=torch.float32)
    if N == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    partial = row_partials(z)
    scale, numbers = parameter(weight, z.dtype), int64(rows)
    native.dropout_add_layer_norm_bwd(
        DTYPES[z.dtype],
        dy.data_ptr(),
        z.data_ptr(),
        address(scale),
        code(scale),
        mean.data_ptr(),
        rstd.data_ptr(),
        address(dz),
        dx.data_ptr(),
        dresidual.data_ptr(),
        partial.data_ptr(),
        dweight.data_ptr(),
        code(dweight),
        dbias.data_ptr(),
        partial.shape[1],
        *dropout_args(p, seed, site),
        address(numbers),
        N,
        C,
        *place(z),
    )
    return dx, dresidual, dweight, dbias
