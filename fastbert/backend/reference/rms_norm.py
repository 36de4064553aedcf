"""rms_norm: y = x rstd weight, rstd = 1 / sqrt(mean(x^2) + eps), over the last dimension (Zhang, Sennrich 2019)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision, nbytes
from fastbert.backend.torch_private import fixed


def unsupported(x: Tensor, weight: Tensor | None, eps: float) -> str | None:
    """The reference runs every call."""
    return None


def forward(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y (N, C) in x's dtype, rstd (N,) fp32."""
    z, w = widen(x, weight)
    rstd = (z.square().mean(-1) + eps).rsqrt()
    y = z * rstd[:, None]
    return (y if w is None else y * w).to(x.dtype), rstd


def backward(
    dy: Tensor,  # (N, C)
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    rstd: Tensor,  # (N,)
) -> tuple[Tensor, Tensor]:
    """dx (N, C) and dweight (C,), which is empty where there is no weight.

    With xhat = x rstd and g = dy weight:  dx = rstd (g - xhat mean(g xhat)),  dweight = sum_n dy xhat
    """
    z, g = (t.to(rstd.dtype) for t in (x, dy))
    xhat = z * rstd[:, None]
    dweight = dy.new_empty(0)
    if weight is not None:
        dweight = (g * xhat).sum(0).to(weight.dtype)
        g = g * weight.to(rstd.dtype)
    dx = rstd[:, None] * (g - xhat * (g * xhat).mean(-1, True))
    return dx.to(x.dtype), dweight


def eager(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """The stock op in the tested dtype: what a user would run, and the error budget's baseline."""
    w = None if weight is None else weight.to(x.dtype)
    return torch.nn.functional.rms_norm(x, fixed(x.shape[-1]), w, eps)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.rms_norm`."""
    draw = Draw(dtype, device, seed)
    shapes = [
        ((1, 3), "one short row"),
        ((7, 13), "primes"),
        ((63, 768), "BERT-base rows, odd count"),
        ((3, 5, 32), "leading dimensions"),
        ((0, 8), "empty"),
    ]
    for shape, why in shapes:
        name, weight = "x".join(map(str, shape)), draw.normal(shape[-1], mean=1.0, scale=0.2)
        yield Sample(f"N{name}", {"x": draw.normal(*shape), "weight": weight, "eps": 1e-6}, why)
    yield Sample("plain", {"x": draw.normal(9, 24), "eps": 1e-6}, "no weight")
    far = {"x": draw.normal(8, 64, mean=30.0), "weight": draw.normal(64), "eps": 1e-6}
    yield Sample("far-mean", far, "a mean that is not subtracted")
    zeros = {"x": draw.normal(5, 24) * (draw.normal(5, 1) > 0), "weight": draw.normal(24)}
    yield Sample("zeros", zeros | {"eps": 1e-3}, "rows of zeros, whose rstd is 1 / sqrt(eps)")
    if low_precision(dtype):
        weight = draw.normal(64, dtype=torch.float32)
        mixed = {"x": draw.normal(8, 64), "weight": weight, "eps": 1e-6}
        yield Sample("mixed", mixed, "fp32 weights")


def cost(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Cost:
    """Forward reads x and writes y; backward reads dy and x and writes dx; the statistic is one fp32 a row."""
    rows, scale = 4 * (x.numel() // max(x.shape[-1], 1)), nbytes(weight)
    return Cost(
        2 * nbytes(x) + rows + scale,
        4 * x.numel(),
        3 * nbytes(x) + rows + 2 * scale,
        10 * x.numel(),
    )
