"""rms_norm on the native CPU kernel, csrc/cpu/rms_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cpu import DTYPES, address, fp32, fresh, native, unsupported_dtype


def unsupported(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    eps: float,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("x", x)


def forward(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y (N, C) in x's dtype, rstd (N,) fp32."""
    count, width = x.shape
    y = fresh(x, *x.shape)
    rstd = x.new_empty(count, dtype=torch.float32)
    if x.numel() > 0:
        weight = fp32(weight)
        native.rms_norm_fwd(
            DTYPES[x.dtype],
            x.data_ptr(),
            address(weight),
            y.data_ptr(),
            rstd.data_ptr(),
            count,
            width,
            eps,
            torch.get_num_threads(),
        )
    return y, rstd


def backward(
    dy: Tensor,  # (N, C)
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    rstd: Tensor,  # (N,) fp32
) -> tuple[Tensor, Tensor]:
    """dx (N, C) in x's dtype and dweight (C,) in weight's, which is empty where there is no weight."""
    count, width = x.shape
    dx = fresh(x, *x.shape)
    dweight = x.new_zeros(width, dtype=torch.float32)
    if x.numel() > 0:
        weight32 = fp32(weight)
        native.rms_norm_bwd(
            DTYPES[x.dtype],
            dy.data_ptr(),
            x.data_ptr(),
            address(weight32),
            rstd.data_ptr(),
            dx.data_ptr(),
            dweight.data_ptr(),
            count,
            width,
            torch.get_num_threads(),
        )
    return dx, dy.new_empty(0) if weight is None else dweight.to(weight.dtype)
