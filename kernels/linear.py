"""linear in Triton: our GEMM up to FEW tokens, else the library's; the bias's gradient by deterministic sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.stock import linear as library
from fastbert.kernels import _gemm, unsupported_dtype
from fastbert.kernels._reduce import sum_rows

# up to this many tokens a launch costs more than the product, and _gemm casts weights without one
FEW = 64


def unsupported(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(x=x, weight=weight, bias=bias)


def forward(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
) -> Tensor:
    """y (T, N) in x's dtype."""
    if x.shape[0] > FEW:
        return library.forward(x, weight, bias)
    return _gemm.project(x, [weight], [] if bias is None else [bias])[0]


def backward(
    dy: Tensor,  # (T, N)
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    needs: Sequence[bool],  # for x, weight, bias
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, K), dweight (N, K), dbias (N,) fp32; empty where not needed."""
    dx, dweight, dbias = library.backward(dy, x, weight, [*needs[:2], False], dtype)
    return dx, dweight, sum_rows(dy) if needs[2] else dbias
