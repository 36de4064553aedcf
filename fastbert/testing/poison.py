"""Poison: outputs start as NaN and inputs are surrounded by NaN, so that a stray read or a missing write shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_GUARD = 64  # elements of poison before and after an input


@contextmanager
def outputs() -> Iterator[None]:
    """Inside, `torch.empty` and its kin return NaN (or the largest integer), and non-deterministic stock ops raise."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def surround(t: Tensor) -> Tensor:
    """A contiguous copy of t that lies inside NaN (floats) or the largest value (integers); gradients are not kept."""
    bad = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    storage = torch.full((t.numel() + 2 * _GUARD,), bad, dtype=t.dtype, device=t.device)
    inside = storage[_GUARD : _GUARD + t.numel()].view(t.shape)
    inside.copy_(t.detach())
    return inside.requires_grad_(t.requires_grad)
