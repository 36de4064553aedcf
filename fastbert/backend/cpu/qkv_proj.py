"""qkv_proj on the native GEMM: three weights are packed from where they are, no copy joins them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.cpu import _gemm, fp32, unsupported_dtype


def unsupported(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], num_heads: int
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("x", x) or unsupported_dtype("weights[0]", weights[0])


def forward(
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],  # [(3HD, C)] or 3 of (HD, C)
    biases: Sequence[Tensor],
    num_heads: int,
) -> Tensor:
    """qkv (T, 3, H, D) in x's dtype."""
    bias = None
    if biases:
        bias = fp32(biases[0] if len(biases) == 1 else torch.cat(list(biases)))
    y = _gemm.project(x, weights, bias)
    return y.view(x.shape[0], 3, num_heads, y.shape[1] // (3 * num_heads))


def backward(
    dqkv: Tensor,  # (T, 3, H, D)
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, C), dweight (3HD, C), dbias (3HD,) fp32; empty where not needed."""
    return _gemm.gradients(dqkv.flatten(1), x, weights, needs)
