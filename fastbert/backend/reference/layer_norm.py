"""layer_norm: y = (x - mean) * rstd * weight + bias over the last dimension (Ba, Kiros, Hinton 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision, nbytes
from fastbert.backend.torch_private import fixed


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    """The reference runs every call."""
    return None


def widen(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the accumulation dtype: fp32, or fp64 where the input is."""
    return tuple(
        None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors
    )


def _moments(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1 / sqrt(biased variance + eps) of each row of z (N, C), the variance taken about the mean."""
    mean = z.mean(-1)
    variance = (z - mean[:, None]).square().mean(-1)
    return mean, (variance + eps).rsqrt()


def rebuilt(
    y: Tensor,  # (N, C), the output, or the input where there is no bias
    weight: Tensor | None,  # (C,), there wherever bias is
    bias: Tensor | None,  # (C,)
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
) -> Tensor:
    """The normalisation's input from its output, (y - bias) / weight / rstd + mean; the mean where a weight is 0.

    (y - bias) / weight is cut at sqrt(C): no element of a normalised row of C exceeds it.
    """
    if weight is None or bias is None:
        return y
    w, b = (t.to(mean.dtype) for t in (weight, bias))
    largest = y.shape[-1] ** 0.5
    xhat = torch.where(w == 0, 0.0, (y.to(mean.dtype) - b) / w).clamp(-largest, largest)
    return (xhat / rstd[:, None] + mean[:, None]).to(y.dtype)


def forward(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, C) in x's dtype, mean and rstd (N,) fp32."""
    z, w, b = widen(x, weight, bias)
    mean, rstd = _moments(z, eps)
    y = (z - mean[:, None]) * rstd[:, None]
    if w is not None:
        y = y * w
    if b is not None:
        y = y + b
    return y.to(x.dtype), mean, rstd


def backward(
    dy: Tensor,  # (N, C)
    x: Tensor,  # (N, C), or y where bias is given
    weight: Tensor | None,  # (C,)
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    bias: Tensor | None = None,  # (C,)
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, C), dweight and dbias (C,), the last in fp32, which are empty where there is no weight.

    With xhat = (x - mean) rstd and g = dy weight:
        dx = rstd (g - mean(g) - xhat mean(g xhat)),  dweight = sum_n dy xhat,  dbias = sum_n dy
    """
    z, g = (t.to(mean.dtype) for t in (x, dy))
    z = rebuilt(z, weight, bias, mean, rstd)
    xhat = (z - mean[:, None]) * rstd[:, None]
    dweight, dbias = dy.new_empty(0), dy.new_empty(0)
    if weight is not None:
        dweight = (g * xhat).sum(0).to(weight.dtype)
        dbias = g.sum(0)
        g = g * weight.to(mean.dtype)
    dx = rstd[:, None] * (g - g.mean(-1, True) - xhat * (g * xhat).mean(-1, True))
    return dx.to(x.dtype), dweight, dbias


def eager(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    from_output: bool = False,
) -> Tensor:
    """The stock op in the tested dtype: what a user would run, and the error budget's baseline."""
    w, b = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return torch.nn.functional.layer_norm(x, fixed(x.shape[-1]), w, b, eps)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.layer_norm`."""
    draw = Draw(dtype, device, seed)
    shapes = [
        ((1, 3), "one short row"),
        ((7, 13), "primes"),
        ((63, 768), "BERT-base rows, odd count"),
        ((3, 5, 32), "leading dimensions"),
        ((0, 8), "empty"),
    ]
    for shape, why in shapes:
        C = shape[-1]
        name = "x".join(map(str, shape))
        weight, bias = draw.normal(C, mean=1.0, scale=0.2), draw.normal(C)
        yield Sample(f"N{name}", {"x": draw.normal(*shape), "weight": weight, "bias": bias}, why)
    yield Sample("plain", {"x": draw.normal(9, 24)}, "no weight, no bias")
    yield Sample("nobias", {"x": draw.normal(9, 24), "weight": draw.normal(24)}, "bias=False")
    far = {"x": draw.normal(8, 64, mean=30.0), "weight": draw.normal(64), "bias": draw.normal(64)}
    yield Sample("far-mean", far, "a large mean: E[x^2] - mean^2 would cancel")
    if low_precision(dtype):
        full = {k: draw.normal(64, dtype=torch.float32) for k in ("weight", "bias")}
        yield Sample("mixed", {"x": draw.normal(8, 64), **full}, "fp32 weights")
    weight, bias = draw.normal(96, mean=1.0, scale=0.2), draw.normal(96, scale=0.1)
    kept = {"x": draw.normal(37, 96), "weight": weight, "bias": bias, "from_output": True}
    yield Sample("N37-output", kept, "xhat rebuilt from the output, with BERT's kind of biases")


def cost(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, **_: Any
) -> Cost:
    """Forward reads x and writes y; backward reads dy and x and writes dx; statistics are two fp32 a row."""
    rows = 8 * (x.numel() // max(x.shape[-1], 1))
    affine = nbytes(weight, bias)
    return Cost(
        2 * nbytes(x) + rows + affine,
        8 * x.numel(),
        3 * nbytes(x) + rows + 2 * affine,
        14 * x.numel(),
    )
