"""The forms of GELU in stock ops."""

from __future__ import annotations

import torch
from torch import Tensor

# of the sigmoid's form, u sigmoid(1.702 u)
_SLOPE = 1.702


def gelu(u: Tensor, approximate: str) -> Tensor:
    """The form of GELU that `approximate` names."""
    if approximate == "sigmoid":
        return u * torch.sigmoid(_SLOPE * u)
    return torch.nn.functional.gelu(u, approximate=approximate)


def gelu_backward(dy: Tensor, u: Tensor, approximate: str) -> Tensor:
    """dy times the derivative of that form at u."""
    if approximate == "sigmoid":
        s = torch.sigmoid(_SLOPE * u)
        return dy * (s + _SLOPE * u * s * (1 - s))
    dx: Tensor = torch.ops.aten.gelu_backward(dy, u, approximate=approximate)
    return dx
