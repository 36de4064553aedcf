"""layer_norm on the native CPU kernel, csrc/cpu/layer_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cpu import DTYPES, address, fp32, fresh, native, unsupported_dtype
from fastbert.backend.reference.layer_norm import rebuilt


def unsupported(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("x", x)


def forward(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, C) in x's dtype, mean and rstd (N,) fp32."""
    count, width = x.shape
    y = fresh(x, *x.shape)
    mean, rstd = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        weight, bias = fp32(weight), fp32(bias)
        native.layer_norm_fwd(
            DTYPES[x.dtype],
            x.data_ptr(),
            address(weight),
            address(bias),
            y.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            count,
            width,
            eps,
            torch.get_num_threads(),
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
    count, width = x.shape
    dx = fresh(x, *x.shape)
    dweight, dbias = (x.new_zeros(width, dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        weight32 = fp32(weight)
        native.layer_norm_bwd(
            DTYPES[x.dtype],
            dy.data_ptr(),
            x.data_ptr(),
            address(weight32),
            mean.data_ptr(),
            rstd.data_ptr(),
            dx.data_ptr(),
            dweight.data_ptr(),
            dbias.data_ptr(),
            count,
            width,
            torch.get_num_threads(),
        )
    if weight is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    return dx, dweight.to(weight.dtype), dbias
