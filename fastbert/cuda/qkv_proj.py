"""qkv_proj: the library's GEMMs, and the biases' gradient by csrc/cuda/linear.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.cuda import linear, unsupported_dtype
from fastbert.stock import qkv_proj as library


def unsupported(
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],  # [(3HD, C)] or 3 of (HD, C)
    biases: Sequence[Tensor],  # likewise, or empty
    num_heads: int,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(x=x, weights=weights[0])


def forward(
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],  # [(3HD, C)] or 3 of (HD, C)
    biases: Sequence[Tensor],  # likewise, or empty
    num_heads: int,
) -> Tensor:
    """qkv (T, 3, H, D) in x's dtype."""
    return library.forward(x, weights, biases, num_heads)


def backward(
    dqkv: Tensor,  # (T, 3, H, D)
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],
    needs: Sequence[bool],  # for x, the weights, the biases
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, C), dweight (3HD, C), dbias (3HD,) fp32; empty where not needed."""
    dx, dweight, dbias = library.backward(dqkv, x, weights, [*needs[:2], False], dtype)
    return dx, dweight, linear.row_sum(dqkv.flatten(1)) if needs[2] else dbias
