"""qkv_proj in Triton: our GEMM up to FEW tokens, for one weight or three; else as `linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.stock import qkv_proj as library
from fastbert.kernels import _gemm, unsupported_dtype
from fastbert.kernels._reduce import sum_rows
from fastbert.kernels.linear import FEW


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
    if x.shape[0] > FEW:
        return library.forward(x, weights, biases, num_heads)
    y, _ = _gemm.project(x, weights, biases)
    return y.view(x.shape[0], 3, num_heads, y.shape[1] // (3 * num_heads))


def backward(
    dqkv: Tensor,  # (T, 3, H, D)
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],
    needs: Sequence[bool],  # for x, the weights, the biases
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, C), dweight (3HD, C), dbias (3HD,) fp32; empty where not needed."""
    dx, dweight, dbias = library.backward(dqkv, x, weights, [*needs[:2], False], dtype)
    return dx, dweight, sum_rows(dqkv.flatten(1)) if needs[2] else dbias
