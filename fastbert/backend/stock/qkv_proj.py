"""qkv_proj by one torch GEMM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.stock import linear


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def forward(
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],  # [(3HD, C)] or 3 of (HD, C)
    biases: Sequence[Tensor],
    num_heads: int,
) -> Tensor:
    """qkv (T, 3, H, D) in x's dtype."""
    y = linear.forward(x, linear.joined(weights), linear.joined(biases) if biases else None)
    return y.view(x.shape[0], 3, num_heads, y.shape[1] // (3 * num_heads))


def backward(
    dqkv: Tensor,  # (T, 3, H, D)
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, C), dweight (3HD, C), dbias (3HD,) fp32; empty where not needed."""
    return linear.backward(dqkv.flatten(1), x, linear.joined(weights), needs, dtype)
