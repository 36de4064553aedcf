"""bias_gelu on the CUDA kernels, csrc/cuda/bias_gelu.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend._common import unsupported_gelu
from fastbert.backend.cuda import (
    DTYPES,
    address,
    code,
    column_partials,
    native,
    parameter,
    place,
    unsupported_dtype,
)


def unsupported(
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_gelu(approximate) or unsupported_dtype(x=x, bias=bias)


def forward(
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> Tensor:
    """y (N, F) in x's dtype."""
    y = torch.empty_like(x)
    if x.numel() > 0:
        shift = parameter(bias, x.dtype)
        native.bias_gelu_fwd(
            DTYPES[x.dtype],
            x.data_ptr(),
            address(shift),
            code(shift),
            y.data_ptr(),
            x.shape[0],
            x.shape[1],
            approximate == "tanh",
            *place(x),
        )
    return y


def backward(
    dy: Tensor,  # (N, F)
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> tuple[Tensor, Tensor]:
    """dx (N, F) in x's dtype and dbias (F,) in bias's, empty without bias."""
    dx, _, dbias = gradients(dy, x, bias, approximate, None if bias is None else bias.dtype)
    return dx, dbias


def gradients(
    dy: Tensor,  # (N, F)
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
    sums: torch.dtype | None,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, F), with `again` gelu(x + bias) (N, F), and dx's sum over the rows (F,) in dtype `sums`; or empty."""
    N, F = x.shape
    dx, empty = torch.empty_like(x), x.new_empty(0)
    y = torch.empty_like(x) if again else empty
    total = empty if sums is None else x.new_empty(F, dtype=sums)
    if x.numel() == 0:
        return dx, y, total.zero_()
    partial, shift = column_partials(x), parameter(bias, x.dtype)
    native.bias_gelu_bwd(
        DTYPES[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        address(shift),
        code(shift),
        dx.data_ptr(),
        y.data_ptr() if again else 0,
        0 if sums is None else partial.data_ptr(),
        total.data_ptr(),
        code(total),
        partial.shape[0],
        N,
        F,
        approximate == "tanh",
        *place(x),
    )
    return dx, y, total
