"""feed_forward by torch's GEMMs and gelu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.stock import bias_gelu, linear
from fastbert.backend.stock._gelu import gelu


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
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
    u = linear.forward(x, w1, b1)
    y = linear.forward(gelu(u, approximate), w2, b2)
    return y, u if save else x.new_empty(0, w1.shape[0])


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
    h = gelu(u, approximate) if needs[3] else u
    dh, dw2, db2 = linear.backward(dy, h, w2, [any(needs[:3]), *needs[3:]], dtype)
    if not any(needs[:3]):
        return dy.new_empty(0), dy.new_empty(0), dy.new_empty(0), dw2, db2
    du, _ = bias_gelu.backward(dh, u, None, approximate)
    return *linear.backward(du, x, w1, needs[:3], dtype), dw2, db2
