"""linear on the native GEMM, csrc/cpu/linear.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.cpu import _gemm, fp32, unsupported_dtype


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("x", x) or unsupported_dtype("weight", weight)


def forward(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
) -> Tensor:
    """y (T, N) in x's dtype."""
    return _gemm.project(x, [weight], fp32(bias))


def backward(
    dy: Tensor,  # (T, N)
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    needs: Sequence[bool],  # for x, weight, bias
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, K), dweight (N, K), dbias (N,) fp32; empty where not needed."""
    return _gemm.gradients(dy, x, [weight], needs)
