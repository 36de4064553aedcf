"""linear in Triton, forward; its backward is the library's two GEMMs, which nothing here beats, and a sum.

On a GPU the `torch` backend comes first in this op's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.kernels import _gemm, unsupported_dtype
from fastbert.stock import linear as library


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
    return _gemm.project(x, [weight], [] if bias is None else [bias])[0]


def backward(
    dy: Tensor,  # (T, N)
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    needs: Sequence[bool],  # for x, weight, bias
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, K), dweight (N, K), dbias (N,) fp32; empty where not needed."""
    return library.backward(dy, x, weight, needs, dtype)
