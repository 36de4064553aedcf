"""The forms of GELU in stock ops."""

from __future__ import annotations

import torch
from torch import Tensor


def gelu(u: Tensor, approximate: str) -> Tensor:
    """The form of GELU that `approximate` names."""
    if approximate == "sigmoid":
        return u * torch.sigmoid(1.702 * u)
    return torch.nn.functional.gelu(u, approximate=approximate)
