"""Dropout bits, defined once: Philox4x32-10 by absolute index, the same for every backend and tile shape.

    words = philox4x32_10(counter, key = the int64 seed as two 32-bit words)
    rows of a matrix:  counter (col // 4, row, site, 0),             word = col % 4
    attention:         counter (j // 4, i, b * H + h, site),         word = j % 4, with i, j counted inside the sequence
    keep iff word >= round(p * 2**32); kept values are scaled by 1 / (1 - p)

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.torch_private import exporting

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _mulhilo(constant: int, c: Tensor) -> tuple[Tensor, Tensor]:
    # the signed 64-bit product wraps, and its bits are those of the unsigned one
    product = c * (constant - (1 << 64) if constant >> 63 else constant)
    return (product >> 32) & _MASK, product & _MASK


def philox4x32_10(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor
) -> tuple[Tensor, ...]:
    """Four uint32 words (as int64) per counter; the counters are int64 tensors in [0, 2**32) that broadcast."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """The smallest word that is kept."""
    return round(p * 2**32)


def _keep(words: tuple[Tensor, ...], cols: int, p: float) -> Tensor:
    stacked = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)
    return stacked[..., :cols] >= threshold(p)


def keep_mask(seed: Tensor, site: int, rows: Tensor | int, cols: int, p: float) -> Tensor:
    """Boolean (N, cols): which elements dropout keeps; `rows` are the absolute row numbers (N,), or N for 0..N-1."""
    device = seed.device
    if isinstance(rows, Tensor):
        row = rows.to(torch.int64)
    else:
        row = torch.arange(rows, dtype=torch.int64, device=device)
    quad = torch.arange((cols + 3) // 4, dtype=torch.int64, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return _keep(philox4x32_10(quad, row[:, None], zero + site, zero, seed), cols, p)


def attention_keep_mask(
    seed: Tensor, site: int, bh: Tensor, rows: int, cols: int, p: float
) -> Tensor:
    """Boolean (*bh.shape, rows, cols): which attention weights dropout keeps; bh holds b * H + h."""
    device = seed.device
    i = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    quad = torch.arange((cols + 3) // 4, dtype=torch.int64, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return _keep(philox4x32_10(quad, i, bh[..., None, None], zero + site, seed), cols, p)


def dropout(
    x: Tensor, p: float, seed: Tensor | None, site: int, rows: Tensor | None = None
) -> Tensor:
    """Dropout of x (N, C) by the bits above, differentiable, in x's dtype; the identity at p = 0.

    An exported program has torch's own dropout, with other bits.
    """
    if p == 0.0:
        return x
    if exporting():
        return torch.nn.functional.dropout(x, p)
    if seed is None:
        raise ValueError(f"dropout with p = {p} needs a seed: an int64 tensor on {x.device}")
    keep = keep_mask(seed, site, x.shape[0] if rows is None else rows, x.shape[1], p)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)
