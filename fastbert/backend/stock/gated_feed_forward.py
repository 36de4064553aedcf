"""gated_feed_forward by torch's GEMMs and activations; both halves come from one GEMM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.stock import linear

# the values of torch's `approximate`
_GELUS = {"gelu": "none", "gelu_tanh": "tanh"}


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def _act(a: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(a)
    return torch.nn.functional.gelu(a, approximate=_GELUS[activation])


def _act_backward(dy: Tensor, a: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, a)
    return torch.ops.aten.gelu_backward(dy, a, approximate=_GELUS[activation])


def forward(
    x: Tensor,  # (T, C)
    w1: Sequence[Tensor],  # [(2F, C)] or 2 of (F, C): the activated half, then the other
    b1: Sequence[Tensor],  # likewise, or empty
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (T, C) and the pre-activations u = [a, g] (T, 2F) in x's dtype, u empty without `save`."""
    u = linear.forward(x, linear.joined(w1), linear.joined(b1) if b1 else None)
    a, g = u.chunk(2, 1)
    y = linear.forward(_act(a, activation) * g, w2, b2)
    return y, u if save else x.new_empty(0, u.shape[1])


def backward(
    dy: Tensor,  # (T, C)
    x: Tensor,  # (T, C)
    u: Tensor,  # (T, 2F)
    w1: Sequence[Tensor],
    w2: Tensor,
    activation: str,
    needs: Sequence[bool],  # for x, w1, b1, w2, b2
    dtype: torch.dtype,  # of dw1 and dw2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1 (2F, C), db1 (2F,), dw2, db2, empty where not needed; act(a) * g is built again from u."""
    a, g = u.chunk(2, 1)
    up = any(needs[:3])
    value = _act(a, activation) if up or needs[3] else a
    h = value * g if needs[3] else g
    dh, dw2, db2 = linear.backward(dy, h, w2, [up, *needs[3:]], dtype)
    if not up:
        return dy.new_empty(0), dy.new_empty(0), dy.new_empty(0), dw2, db2
    du = torch.cat([_act_backward(dh * g, a, activation), dh * value], 1)
    return *linear.backward(du, x, linear.joined(w1), needs[:3], dtype), dw2, db2
