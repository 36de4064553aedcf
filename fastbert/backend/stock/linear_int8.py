"""linear_int8 in stock PyTorch: the fp64 GEMM adds these integers without rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.reference.linear_int8 import quantize_rows


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def forward(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    bias: Tensor | None,  # (N,)
    bits: int,
) -> Tensor:
    """y (T, N) in x's dtype."""
    q, a = quantize_rows(x, bits)
    # torch._int_mm takes 8 bits only, and on a CPU without VNNI it is 15 times slower than this
    sums = q.double() @ weight.t().double()
    y = sums.to(torch.promote_types(x.dtype, torch.float32))
    y.mul_(a[:, None]).mul_(scale)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def backward(
    dy: Tensor,  # (T, N)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    needs: Sequence[bool],  # for x, bias
) -> tuple[Tensor, Tensor]:
    """dx (T, K) in dy's dtype, dbias (N,) fp32; empty where not needed."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx = dbias = dy.new_empty(0)
    if needs[0]:
        dx = ((dy.to(wide) * scale.to(wide)) @ weight.to(wide)).to(dy.dtype)
    if needs[1]:
        dbias = dy.sum(0, dtype=wide)
    return dx, dbias
