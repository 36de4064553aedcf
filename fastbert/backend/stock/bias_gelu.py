"""bias_gelu by torch's gelu, or its sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.stock._gelu import gelu, gelu_backward


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias in x's dtype."""
    return x if bias is None else x + bias.to(x.dtype)


def forward(
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> Tensor:
    """y (N, F) in x's dtype."""
    return gelu(_biased(x, bias), approximate)


def backward(
    dy: Tensor,  # (N, F)
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> tuple[Tensor, Tensor]:
    """dx (N, F) and dbias (F,), empty without bias."""
    dx = gelu_backward(dy, _biased(x, bias), approximate)
    if bias is None:
        return dx, dx.new_empty(0)
    return dx, dx.sum(0, dtype=torch.promote_types(dx.dtype, torch.float32)).to(bias.dtype)
