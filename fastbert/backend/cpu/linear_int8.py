"""linear_int8 on the native kernel, csrc/cpu/linear_int8.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.cpu import DTYPES, _gemm, address, fp32, fresh, native, unsupported_dtype
from fastbert.backend.reference.linear_int8 import LEVELS


def unsupported(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    bias: Tensor | None,  # (N,)
    bits: int,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("x", x)


def forward(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    bias: Tensor | None,  # (N,)
    bits: int,
) -> Tensor:
    """y (T, N) in x's dtype."""
    (T, K), N = x.shape, weight.shape[0]
    weight, scale, bias = weight.contiguous(), fp32(scale), fp32(bias)
    y = fresh(x, T, N)
    native.linear_int8_fwd(
        DTYPES[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        address(bias),
        y.data_ptr(),
        T,
        N,
        K,
        LEVELS[bits],
        torch.get_num_threads(),
    )
    return y


def backward(
    dy: Tensor,  # (T, N)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    needs: Sequence[bool],  # for x, bias
) -> tuple[Tensor, Tensor]:
    """dx (T, K) in dy's dtype, dbias (N,) fp32; empty where not needed."""
    dx = dy.new_empty(0)
    if needs[0]:
        g = dy.to(torch.float32) * fp32(scale)
        dx = _gemm.project(g, [weight.t().to(torch.float32)], None).to(dy.dtype)
    return dx, _gemm.gradients(dy, dy, [weight], [False, False, needs[1]])[2]
