"""rms_norm by stock ops: the reference's are the ones that torch.nn.functional.rms_norm runs on a CPU."""

from __future__ import annotations

from torch import Tensor

from fastbert.backend.reference import rms_norm


def unsupported(x: Tensor, weight: Tensor | None, eps: float) -> str | None:
    """Stock ops run every call."""
    return None


def forward(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y (N, C) in x's dtype, rstd (N,) fp32."""
    return rms_norm.forward(x, weight, eps)


def backward(
    dy: Tensor,  # (N, C)
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    rstd: Tensor,  # (N,)
) -> tuple[Tensor, Tensor]:
    """dx (N, C) and dweight (C,), which is empty where there is no weight."""
    return rms_norm.backward(dy, x, weight, rstd)
