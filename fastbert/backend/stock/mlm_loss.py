"""mlm_loss by torch's GEMMs on the labelled rows, the gradient in place of the logits, in chunks above max_rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend._common import picked
from fastbert.backend.stock import cross_entropy, linear


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def _times(g: Tensor, w: Tensor) -> Tensor:
    """g (R, V) @ w (V, C). For few rows MKL adds the long fp32 sum naively, 2e-5 off against 7e-7: pad to 16 rows."""
    rows = g.shape[0]
    if rows >= 16 or g.dtype != torch.float32:
        return g @ w
    return (torch.nn.functional.pad(g, (0, 0, 0, 16 - rows)) @ w)[:rows]


def _unscaled(logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return cross_entropy.backward(torch.ones_like(lse), logits, labels, lse, ignore_index)


def forward(
    hidden: Tensor,  # (T, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,)
    rows: Tensor | None,  # (R,)
    ignore_index: int,
    max_rows: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss (), lse (R,), both fp32, and p - onehot (R, V), empty without `save` or above max_rows."""
    h = picked(hidden, rows)
    w, b = linear.cast(h, weight, bias)
    losses, lses = [], []
    dlogits = hidden.new_empty(0, weight.shape[0])
    # at least one chunk, so that no row at all still gives a sum
    for part, of in zip(h.split(max_rows), labels.split(max_rows), strict=True):
        logits = torch.nn.functional.linear(part, w, b)
        loss, lse = cross_entropy.forward(logits, of, ignore_index)
        losses.append(loss)
        lses.append(lse)
        if save and labels.shape[0] <= max_rows:
            dlogits = _unscaled(logits, of, lse, ignore_index)
    return torch.cat(losses).sum(), torch.cat(lses), dlogits


def backward(
    dloss: Tensor,  # ()
    hidden: Tensor,  # (T, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,)
    rows: Tensor | None,  # (R,)
    lse: Tensor,  # (R,)
    dlogits: Tensor,  # (R, V), or empty
    ignore_index: int,
    max_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden (T, C), dweight (V, C), dbias (V,) fp32, scaled by dloss after the GEMMs; empty where not needed."""
    h = picked(hidden, rows)
    w, b = linear.cast(h, weight, bias)
    wide = torch.promote_types(h.dtype, torch.float32)
    dh = torch.empty_like(h) if needs[0] else h.new_empty(0)
    dweight = torch.zeros(weight.shape if needs[1] else (0,), dtype=wide, device=h.device)
    dbias = torch.zeros(weight.shape[0] if needs[2] else 0, dtype=wide, device=h.device)
    for start in range(0, h.shape[0], max_rows):
        part = slice(start, start + max_rows)
        if labels.shape[0] <= max_rows:
            g = dlogits
        else:
            g = _unscaled(
                torch.nn.functional.linear(h[part], w, b), labels[part], lse[part], ignore_index
            )
        if needs[0]:
            dh[part] = _times(g, w) * dloss
        if needs[1]:
            dweight += g.t() @ h[part]
        if needs[2]:
            dbias += g.sum(0, dtype=wide)
    if needs[0] and rows is not None:
        dh = torch.zeros_like(hidden).index_add_(0, rows, dh)
    return dh, dweight.mul_(dloss).to(weight.dtype), dbias.mul_(dloss)
