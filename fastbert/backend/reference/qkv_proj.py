"""qkv_proj: query, key and value in one GEMM, (T, C) -> (T, 3, H, D) (Vaswani et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastbert.backend.reference import linear
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def forward(
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],  # [(3HD, C)] or 3 of (HD, C)
    biases: Sequence[Tensor],  # likewise, or empty
    num_heads: int,
) -> Tensor:
    """qkv (T, 3, H, D) in x's dtype."""
    y = linear.forward(x, _joined(weights), _joined(biases) if biases else None)
    return y.view(x.shape[0], 3, num_heads, y.shape[1] // (3 * num_heads))


def backward(
    dqkv: Tensor,  # (T, 3, H, D)
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],
    needs: Sequence[bool],  # for x, the weights, the biases
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, C), dweight (3HD, C), dbias (3HD,) fp32; empty where not needed."""
    return linear.backward(dqkv.flatten(1), x, _joined(weights), needs, dtype)


def eager(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None, num_heads: int = 1
) -> Tensor:
    """Stock ops in the tested dtype."""
    y = linear.eager(x, _joined(weights), _joined(biases) if biases else None)
    return y.view(x.shape[0], 3, num_heads, y.shape[1] // (3 * num_heads))


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.qkv_proj`."""
    draw = Draw(dtype, device, seed)

    def call(
        T: int, C: int, H: int, parts: int, bias: bool = True, weights: torch.dtype | None = None
    ) -> dict:
        rows = 3 * C // parts
        return {
            "x": draw.normal(T, C),
            "weights": [draw.normal(rows, C, scale=C**-0.5, dtype=weights) for _ in range(parts)],
            "biases": [draw.normal(rows, dtype=weights) for _ in range(parts)] if bias else None,
            "num_heads": H,
        }

    yield Sample("T1-C2-H1", call(1, 2, 1, 1), "one token")
    yield Sample("T7-C15-H3-split", call(7, 15, 3, 3), "odd head size, three weights")
    yield Sample("T33-C384-H12-split", call(33, 384, 12, 3), "MiniLM")
    yield Sample("T5-C8-H2-nobias", call(5, 8, 2, 1, bias=False), "no bias")
    yield Sample("T0-C8-H2", call(0, 8, 2, 3), "empty")
    whole, bias = draw.normal(12, 4), draw.normal(12)
    adjacent = {"weights": list(whole.split(4)), "biases": list(bias.split(4)), "num_heads": 2}
    yield Sample(
        "adjacent", {"x": draw.normal(6, 4), **adjacent}, "three weights side by side in memory"
    )
    if low_precision(dtype):
        yield Sample("mixed", call(9, 32, 4, 3, weights=torch.float32), "fp32 weights")


def cost(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None, num_heads: int = 1
) -> Cost:
    """One GEMM forward, two backward."""
    return linear.cost(x, _joined(weights), _joined(biases) if biases else None)
