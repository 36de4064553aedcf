"""The backward of feed_forward that the GPU backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def backward(
    linear_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    gelu_gradients: Callable[..., tuple[Tensor, Tensor, Tensor]],
    dy: Tensor,  # (T, C)
    x: Tensor,  # (T, C)
    u: Tensor,  # (T, F)
    w1: Tensor,
    w2: Tensor,
    approximate: str,
    needs: Sequence[bool],  # for x, w1, b1, w2, b2
    dtype: torch.dtype,  # of dw1 and dw2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """feed_forward's backward by a backend's `linear` and its one pass for gelu's gradient, its sum and gelu(u)."""
    dx = dw1 = db1 = x.new_empty(0)
    dh, _, db2 = linear_backward(dy, u, w2, [any(needs[:3]), False, needs[4]], dtype)
    if any(needs[:3]):
        sums = torch.float32 if needs[2] else None
        du, h, db1 = gelu_gradients(dh, u, None, approximate, sums, again=needs[3])
        dx, dw1, _ = linear_backward(du, x, w1, [*needs[:2], False], dtype)
    else:
        h = torch.nn.functional.gelu(u, approximate=approximate)
    _, dw2, _ = linear_backward(dy, h, w2, [False, needs[3], False], dtype)
    return dx, dw1, db1, dw2, db2
