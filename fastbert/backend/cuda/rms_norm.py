"""rms_norm on the CUDA kernels, csrc/cuda/rms_norm.cu."""

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
        scale = parameter(weight, x.dtype)
        native.rms_norm_fwd(
            DTYPES[x.dtype],
            x.data_ptr(),
            address(scale),
            code(scale),
            y.data_ptr(),
            rstd.data_ptr(),
            N,
            C,
            eps,
            *place(x),
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
    if weight is None:
        dweight = dy.new_empty(0)
    else:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if N == 0:
        return dx, dweight.zero_()
    partial = row_partials(x, sums=1)
    scale = parameter(weight, x.dtype)
    native.rms_norm_bwd(
        DTYPES[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        address(scale),
        code(scale),
        rstd.data_ptr(),
        dx.data_ptr(),
        0 if weight is None else partial.data_ptr(),
        address(dweight),
        code(dweight),
        partial.shape[1],
        N,
        C,
        *place(x),
    )
    return dx, dweight
