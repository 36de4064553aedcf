"""mlm_loss on the native GEMM and softmax: labelled rows only, the gradient in place of the logits, chunks if many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend._common import picked
from fastbert.backend.cpu import _gemm, cross_entropy, fp32, native, row_losses, unsupported_dtype


def unsupported(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    max_rows: int,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("hidden", hidden) or unsupported_dtype("weight", weight)


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
    h, b = picked(hidden, rows), fp32(bias)
    if save and labels.shape[0] <= max_rows:
        dlogits = _gemm.project(h, [weight], b)
        loss, lse = row_losses(native.cross_entropy_inplace, dlogits, labels, ignore_index)
        return loss.sum(), lse, dlogits
    losses, lses = [], []
    for part, of in zip(h.split(max_rows), labels.split(max_rows), strict=True):
        loss, lse = cross_entropy.forward(_gemm.project(part, [weight], b), of, ignore_index)
        losses.append(loss)
        lses.append(lse)
    return torch.cat(losses).sum(), torch.cat(lses), hidden.new_empty(0, weight.shape[0])


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
    """dhidden (T, C), dweight (V, C), dbias (V,) fp32, scaled by dloss in the GEMMs; empty where not needed."""
    h, alpha = picked(hidden, rows), float(dloss)
    if labels.shape[0] <= max_rows:
        dh, dweight, dbias = _gemm.gradients(dlogits, h, [weight], needs, alpha)
    else:
        dh, dweight, dbias = _chunked(
            h, weight, fp32(bias), labels, ignore_index, max_rows, needs, alpha
        )
    if needs[0] and rows is not None:
        dh = torch.zeros_like(hidden).index_add_(0, rows, dh)
    return dh, dweight, dbias


def _chunked(
    h: Tensor,  # (R, C)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    max_rows: int,
    needs: Sequence[bool],
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with the logits built again, max_rows at a time; the weights' are summed in fp32."""
    parts = []
    dweight = h.new_zeros(weight.shape if needs[1] else (0,), dtype=torch.float32)
    dbias = h.new_zeros(weight.shape[0] if needs[2] else 0, dtype=torch.float32)
    for part, of in zip(h.split(max_rows), labels.split(max_rows), strict=True):
        g = _gemm.project(part, [weight], bias)
        row_losses(native.cross_entropy_inplace, g, of, ignore_index)
        dpart, dw, db = _gemm.gradients(g, part, [weight], needs, alpha, torch.float32)
        parts.append(dpart)
        dweight += dw
        dbias += db
    return torch.cat(parts), dweight.to(weight.dtype), dbias
