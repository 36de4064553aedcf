"""dropout_add_layer_norm on the native CPU kernel, csrc/cpu/dropout_add_layer_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cpu import (
    DTYPES,
    address,
    dropout_args,
    fp32,
    fresh,
    int64,
    native,
    unsupported_dropout,
    unsupported_dtype,
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
    return unsupported_dtype("x", x) or unsupported_dropout(p)


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
    count, width = x.shape
    y = fresh(x, *x.shape)
    z = fresh(x, count if save else 0, width)
    mean, rstd = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        weight, bias, rows = fp32(weight), fp32(bias), int64(rows)
        native.dropout_add_layer_norm_fwd(
            DTYPES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            address(weight),
            address(bias),
            y.data_ptr(),
            z.data_ptr() if save else 0,
            mean.data_ptr(),
            rstd.data_ptr(),
            count,
            width,
            eps,
            *dropout_args(p, seed, site),
            address(rows),
            torch.get_num_threads(),
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
    count, width = z.shape
    dx, dresidual = fresh(z, *z.shape), fresh(z, *z.shape)
    if z.numel() == 0:
        return dx, dresidual, torch.zeros_like(weight), mean.new_zeros(width)
    dweight, dbias = (z.new_empty(width, dtype=torch.float32) for _ in range(2))
    weight32, rows = fp32(weight), int64(rows)
    native.dropout_add_layer_norm_bwd(
        DTYPES[z.dtype],
        dy.data_ptr(),
        z.data_ptr(),
        address(weight32),
        mean.data_ptr(),
        rstd.data_ptr(),
        address(dz),
        dx.data_ptr(),
        dresidual.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        count,
        width,
        *dropout_args(p, seed, site),
        address(rows),
        torch.get_num_threads(),
    )
    return dx, dresidual, dweight.to(weight.dtype), dbias
