"""bias_gelu on the native CPU kernel, csrc/cpu/bias_gelu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cpu import DTYPES, GELUS, address, fp32, fresh, native, unsupported_dtype


def unsupported(
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("x", x)


def forward(
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> Tensor:
    """y (N, F) in x's dtype."""
    y = fresh(x, *x.shape)
    if x.numel() > 0:
        bias = fp32(bias)
        native.bias_gelu_fwd(
            DTYPES[x.dtype],
            x.data_ptr(),
            address(bias),
            y.data_ptr(),
            x.shape[0],
            x.shape[1],
            GELUS[approximate],
            torch.get_num_threads(),
        )
    return y


def backward(
    dy: Tensor,  # (N, F)
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> tuple[Tensor, Tensor]:
    """dx (N, F) in x's dtype and dbias (F,) in bias's, empty without bias."""
    dx = fresh(x, *x.shape)
    if x.numel() == 0:
        return dx, x.new_empty(0) if bias is None else torch.zeros_like(bias)
    bias32 = fp32(bias)
    dbias = x.new_empty(0 if bias is None else x.shape[1], dtype=torch.float32)
    native.bias_gelu_bwd(
        DTYPES[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        address(bias32),
        dx.data_ptr(),
        0 if bias is None else dbias.data_ptr(),
        x.shape[0],
        x.shape[1],
        GELUS[approximate],
        torch.get_num_threads(),
    )
    return dx, dx.new_empty(0) if bias is None else dbias.to(bias.dtype)
