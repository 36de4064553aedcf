"""linear: y = x weight^T + bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision, nbytes


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def forward(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
) -> Tensor:
    """y (T, N) in x's dtype."""
    wide_x, w, b = widen(x, weight, bias)
    y = wide_x @ w.t()
    return (y if b is None else y + b).to(x.dtype)


def backward(
    dy: Tensor,  # (T, N)
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    needs: Sequence[bool],  # for x, weight, bias
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy weight, dweight = dy^T x, dbias = sum_t dy, fp32; empty where not needed."""
    g, wide_x, w = widen(dy, x, weight)
    dx = (g @ w).to(x.dtype) if needs[0] else dy.new_empty(0)
    dweight = (g.t() @ wide_x).to(dtype) if needs[1] else dy.new_empty(0)
    dbias = g.sum(0) if needs[2] else dy.new_empty(0)
    return dx, dweight, dbias


def eager(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The stock op in the tested dtype."""
    return torch.nn.functional.linear(
        x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    )


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.linear`."""
    draw = Draw(dtype, device, seed)

    def call(
        T: int, K: int, N: int, bias: bool = True, weights: torch.dtype | None = None
    ) -> dict[str, Any]:
        weight = draw.normal(N, K, scale=K**-0.5, dtype=weights)
        return {
            "x": draw.normal(T, K),
            "weight": weight,
            "bias": draw.normal(N, dtype=weights) if bias else None,
        }

    yield Sample("T1-K1-N1", call(1, 1, 1), "one element")
    yield Sample("T7-K13-N5", call(7, 13, 5), "primes")
    yield Sample("T33-K768-N768", call(33, 768, 768), "attention output of BERT-base")
    yield Sample("nobias", call(9, 8, 2, bias=False), "bias=None")
    yield Sample("T0", call(0, 8, 4), "empty")
    leading = call(6, 16, 3)
    yield Sample("leading", leading | {"x": leading["x"].view(2, 3, 16)}, "leading dimensions")
    strided = call(6, 16, 3)
    yield Sample("strided", strided | {"x": strided["x"].t().contiguous().t()}, "non-contiguous")
    if low_precision(dtype):
        yield Sample("mixed", call(9, 64, 32, weights=torch.float32), "fp32 weights")


def cost(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
    """One GEMM forward, two backward."""
    rows = x.numel() // max(x.shape[-1], 1)
    flops = 2 * rows * weight.numel()
    out = rows * weight.shape[0] * x.element_size()
    moved = nbytes(x, weight, bias) + out
    return Cost(moved, flops, 2 * nbytes(x, weight, bias) + out, 2 * flops)
