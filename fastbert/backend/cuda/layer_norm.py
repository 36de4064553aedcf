"""layer_norm on the CUDA kernels, csrc/cuda/layer_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cuda import (
    DTYPES,
    address,
    code,
    native,
    parameter,
    place,
    row_partials,
    unsupported_dtype,
    unsupported_width,
)
from fastbert.backend.reference.layer_norm import rebuilt


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
        weight, bias = parameter(weight, x.dtype), parameter(bias, x.dtype)
        native.layer_norm_fwd(
            DTYPES[x.dtype],
            x.data_ptr(),
            address(weight),
            code(weight),
            address(bias),
            code(bias),
            y.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            N,
            C,
            eps,
            *place(x),
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
    """dx (N, C) in x's dtype, dweight (C,) in weight's and dbias in fp32, which are empty where there is no weight."""
    x = rebuilt(x, weight, bias, mean, rstd)
    N, C = x.shape
    dx = torch.empty_like(x)
    if weight is None:
        dweight, dbias = dy.new_empty(0), dy.new_empty(0)
    else:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        dbias = x.new_empty(C, dtype=torch.float32)
    if N == 0:
        return dx, dweight.zero_(), dbias.zero_()
    partial = row_partials(x)
    scale = parameter(weight, x.dtype)
    native.layer_norm_bwd(
        DTYPES[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        address(scale),
        code(scale),
        mean.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        0 if weight is None else partial.data_ptr(),
        address(dweight),
        code(dweight),
        dbias.data_ptr(),
        partial.shape[1],
        N,
        C,
        *place(x),
    )
    return dx, dweight, dbias
