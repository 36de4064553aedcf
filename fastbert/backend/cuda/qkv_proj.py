"""qkv_proj on the CUDA kernel, csrc/cuda/qkv_proj.cu: weights are read where they lie; backward is the library's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.cuda import (
    DTYPES,
    address,
    code,
    linear,
    native,
    parameter,
    place,
    unsupported_dtype,
)
from fastbert.backend.stock import qkv_proj as library


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
    T, K = x.shape
    x = x.contiguous()
    w = [weight.to(x.dtype).contiguous() for weight in weights]
    b = [parameter(bias, x.dtype) for bias in biases] or [None]
    N = sum(weight.shape[0] for weight in w)
    qkv = x.new_empty(T, 3, num_heads, N // (3 * num_heads))
    if qkv.numel() > 0:
        native.qkv_proj_fwd(
            DTYPES[x.dtype],
            x.data_ptr(),
            *_three(w),
            *_three(b),
            code(b[0]),
            qkv.data_ptr(),
            T,
            K,
            N,
            *place(x),
        )
    return qkv


def _three(tensors: Sequence[Tensor | None]) -> tuple[int, int, int]:
    """Three addresses: of one tensor and two zeros, or of three tensors."""
    first, second, third = (*tensors, None, None)[:3]
    return address(first), address(second), address(third)


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
