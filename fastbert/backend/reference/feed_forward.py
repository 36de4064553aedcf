"""feed_forward: y = gelu(x w1^T + b1) w2^T + b2 (Vaswani et al. 2017, with BERT's GELU)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastbert.backend.reference import bias_gelu, linear
from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def forward(
    x: Tensor,  # (T, C)
    w1: Tensor,  # (F, C)
    b1: Tensor | None,  # (F,)
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    approximate: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (T, C) and the pre-activation u (T, F) in x's dtype, u empty without `save`."""
    wide_x, wide_w1, wide_b1 = widen(x, w1, b1)
    u = linear.forward(wide_x, wide_w1, wide_b1)
    y = linear.forward(bias_gelu.forward(u, None, approximate), *widen(w2, b2))
    return y.to(x.dtype), u.to(x.dtype) if save else x.new_empty(0, w1.shape[0])


def backward(
    dy: Tensor,  # (T, C)
    x: Tensor,  # (T, C)
    u: Tensor,  # (T, F)
    w1: Tensor,
    w2: Tensor,
    approximate: str,
    needs: Sequence[bool],  # for x, w1, b1, w2, b2
    dtype: torch.dtype,  # of dw1 and dw2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, db1, dw2, db2, empty where not needed; gelu(u) is built again from u."""
    g, wide_u = widen(dy, u)
    h = bias_gelu.forward(wide_u, None, approximate)
    dh, dw2, db2 = linear.backward(g, h, w2, [True, *needs[3:]], dtype)
    du, _ = bias_gelu.backward(dh, wide_u, None, approximate)
    (wide_x,) = widen(x)
    dx, dw1, db1 = linear.backward(du, wide_x, w1, needs[:3], dtype)
    return dx.to(x.dtype), dw1, db1, dw2, db2


def eager(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str = "none",
) -> Tensor:
    """Stock ops in the tested dtype."""
    return linear.eager(bias_gelu.eager(linear.eager(x, w1, b1), None, approximate), w2, b2)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.feed_forward`."""
    draw = Draw(dtype, device, seed)

    def call(T: int, C: int, F: int, bias: bool = True, weights: torch.dtype | None = None) -> dict:
        return {
            "x": draw.normal(T, C),
            "w1": draw.normal(F, C, scale=C**-0.5, dtype=weights),
            "b1": draw.normal(F, dtype=weights) if bias else None,
            "w2": draw.normal(C, F, scale=F**-0.5, dtype=weights),
            "b2": draw.normal(C, dtype=weights) if bias else None,
        }

    yield Sample("T1-C1-F1", call(1, 1, 1), "one element")
    yield Sample("T5-C7-F11", call(5, 7, 11), "primes")
    yield Sample("T5-C8-F16-tanh", call(5, 8, 16) | {"approximate": "tanh"}, "gelu_new")
    yield Sample("T5-C8-F16-sigmoid", call(5, 8, 16) | {"approximate": "sigmoid"}, "quick_gelu")
    yield Sample("T33-C192-F768", call(33, 192, 768), "a small encoder")
    yield Sample("nobias", call(3, 4, 6, bias=False), "no biases")
    yield Sample("T0-C8-F16", call(0, 8, 16), "empty")
    if low_precision(dtype):
        yield Sample("mixed", call(9, 32, 128, weights=torch.float32), "fp32 weights")


def cost(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str = "none",
) -> Cost:
    """Two GEMMs forward, four backward; the activation between them is written and read once."""
    u = x.new_empty(x.numel() // max(x.shape[-1], 1), w1.shape[0])
    up, down, act = linear.cost(x, w1, b1), linear.cost(u, w2, b2), bias_gelu.cost(u)
    return Cost(*(a + b + c for a, b, c in zip(up, down, act, strict=True)))
