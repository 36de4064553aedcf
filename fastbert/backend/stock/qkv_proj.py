"""qkv_proj by one torch GEMM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.stock import linear


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts stacked on their rows: a view where they already lie side by side in memory, else a copy."""
    first = parts[0]
    if len(parts) == 1:
        return first
    stride = first.numel() * first.element_size()
    storage = first.untyped_storage().data_ptr()
    adjacent = all(
        p.is_contiguous()
        and p.untyped_storage().data_ptr() == storage
        and p.data_ptr() == first.data_ptr() + i * stride
        for i, p in enumerate(parts)
    )
    if adjacent:
        return first.detach().as_strided(
            (len(parts) * first.shape[0], *first.shape[1:]), first.stride()
        )
    return torch.cat(list(parts))


def forward(
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],  # [(3HD, C)] or 3 of (HD, C)
    biases: Sequence[Tensor],
    num_heads: int,
) -> Tensor:
    """qkv (T, 3, H, D) in x's dtype."""
    y = linear.forward(x, _joined(weights), _joined(biases) if biases else None)
    return y.view(x.shape[0], 3, num_heads, y.shape[1] // (3 * num_heads))


def backward(
    dqkv: Tensor,  # (T, 3, H, D)
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, C), dweight (3HD, C), dbias (3HD,) fp32; empty where not needed."""
    return linear.backward(dqkv.flatten(1), x, _joined(weights), needs, dtype)
