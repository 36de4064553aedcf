"""bias_gelu: y = gelu(x + bias), gelu(u) = u Phi(u) exactly, or an approximation by tanh or the sigmoid.

Hendrycks, Gimpel 2016.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision, nbytes

_A, _B, _C = math.sqrt(2 / math.pi), 0.044715, 1.702
FORMS = ("none", "tanh", "sigmoid")


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def _gelu(u: Tensor, approximate: str) -> Tensor:
    """u Phi(u), or u / 2 (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))), or u sigmoid(1.702 u)."""
    if approximate == "sigmoid":
        return u * torch.sigmoid(_C * u)
    if approximate == "tanh":
        return 0.5 * u * (1 + torch.tanh(_A * (u + _B * u**3)))
    return 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))


def _gelu_derivative(u: Tensor, approximate: str) -> Tensor:
    """Phi(u) + u phi(u), or the derivative of the approximation."""
    if approximate == "sigmoid":
        s = torch.sigmoid(_C * u)
        return s + _C * u * s * (1 - s)
    if approximate == "tanh":
        t = torch.tanh(_A * (u + _B * u**3))
        return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * _A * (1 + 3 * _B * u * u)
    density = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * density


def forward(
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> Tensor:
    """y (N, F) in x's dtype."""
    u, b = widen(x, bias)
    return _gelu(u if b is None else u + b, approximate).to(x.dtype)


def backward(
    dy: Tensor,  # (N, F)
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> tuple[Tensor, Tensor]:
    """dx = dy gelu'(x + bias) (N, F) and dbias = sum_n dx (F,), empty without bias."""
    g, u, b = widen(dy, x, bias)
    dx = g * _gelu_derivative(u if b is None else u + b, approximate)
    dbias = dx.new_empty(0) if bias is None else dx.sum(0).to(bias.dtype)
    return dx.to(x.dtype), dbias


def eager(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """Stock ops in the tested dtype."""
    u = x if bias is None else x + bias.to(x.dtype)
    if approximate == "sigmoid":
        return u * torch.sigmoid(_C * u)
    return torch.nn.functional.gelu(u, approximate=approximate)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.bias_gelu`."""
    draw = Draw(dtype, device, seed)
    yield Sample("T1-F1", {"x": draw.normal(1, 1), "bias": draw.normal(1)}, "one element")
    yield Sample("T7-F13", {"x": draw.normal(7, 13), "bias": draw.normal(13)}, "primes")
    tanh = {"x": draw.normal(5, 33), "bias": draw.normal(33), "approximate": "tanh"}
    yield Sample("T5-F33-tanh", tanh, "gelu_new")
    yield Sample("T5-F33-sigmoid", tanh | {"approximate": "sigmoid"}, "quick_gelu")
    yield Sample("T31-F3072", {"x": draw.normal(31, 3072), "bias": draw.normal(3072)}, "BERT-base")
    yield Sample("nobias", {"x": draw.normal(2, 3, 8)}, "the GELU drop-in")
    yield Sample(
        "tails",
        {"x": draw.normal(4, 64, scale=8.0), "bias": draw.normal(64)},
        "where gelu is 0 or x",
    )
    yield Sample("T0-F8", {"x": draw.normal(0, 8), "bias": draw.normal(8)}, "empty")
    if low_precision(dtype):
        yield Sample(
            "mixed",
            {"x": draw.normal(8, 64), "bias": draw.normal(64, dtype=torch.float32)},
            "fp32 bias",
        )


def cost(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Cost:
    """Forward reads x and writes y; backward reads dy and x and writes dx."""
    return Cost(
        2 * nbytes(x) + nbytes(bias),
        10 * x.numel(),
        3 * nbytes(x) + 2 * nbytes(bias),
        20 * x.numel(),
    )
