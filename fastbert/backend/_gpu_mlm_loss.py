"""mlm_loss on a GPU: the library's GEMMs on labelled rows, around a backend's softmax that makes the gradient in place.

The GEMMs take a vocabulary padded to a multiple of 8: with BERT's 30522 the library would read 4 bytes at a time. The
copy of the weight, which the cast makes anyway, is padded by rows of zeros. The softmax adds the bias and writes zeros
into the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastbert.backend._common import picked
from fastbert.backend.stock import linear

# (logits, V, bias, labels, ignore_index, where the gradient goes or None) -> loss and lse of every row
RowLosses = Callable[..., tuple[Tensor, Tensor]]


def loss_width(V: int) -> int:
    """Elements in memory of a row of V logits, or of their gradient."""
    return -(-V // 8) * 8


def _operand(h: Tensor, weight: Tensor) -> Tensor:
    """The weight in h's dtype, its rows padded by zeros (padded V, C)."""
    V, C = weight.shape
    if loss_width(V) == V:
        return linear.cast(h, weight, None)[0]
    operand = h.new_empty(loss_width(V), C)
    operand[:V].copy_(weight)
    operand[V:].zero_()
    return operand


def forward(
    row_losses: RowLosses,
    hidden: Tensor,  # (T, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,)
    rows: Tensor | None,  # (R,)
    ignore_index: int,
    max_rows: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss (), lse (R,), both fp32, and p - onehot (R, padded V), empty without `save` or above max_rows."""
    h, V = picked(hidden, rows), weight.shape[0]
    operand = _operand(h, weight)
    kept = save and labels.shape[0] <= max_rows
    losses, lses, logits = [], [], h.new_empty(0, operand.shape[0])
    for part, of in zip(h.split(max_rows), labels.split(max_rows), strict=True):
        logits = part @ operand.t()
        loss, lse = row_losses(logits, V, bias, of, ignore_index, logits if kept else None)
        losses.append(loss)
        lses.append(lse)
    return torch.cat(losses).sum(), torch.cat(lses), logits if kept else logits[:0].clone()


def backward(
    row_losses: RowLosses,
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor],  # (x, scale, dtype)
    dloss: Tensor,  # ()
    hidden: Tensor,  # (T, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,)
    rows: Tensor | None,  # (R,)
    lse: Tensor,  # (R,)
    dlogits: Tensor,  # (R, padded V), or empty
    ignore_index: int,
    max_rows: int,
    needs: Sequence[bool],  # for hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden (T, C), dweight (V, C), dbias (V,) fp32, scaled by dloss after the GEMMs; empty where not needed."""
    h, V = picked(hidden, rows), weight.shape[0]
    operand = _operand(h, weight)
    if labels.shape[0] <= max_rows:
        dh, dweight, dbias = linear.backward(dlogits, h, operand, needs, h.dtype)
    else:
        dh, dweight, dbias = _chunked(
            row_losses, h, operand, V, bias, labels, ignore_index, max_rows, needs
        )
    dh = scaled(dh, dloss, dh.dtype)
    if needs[0] and rows is not None:
        dh = torch.zeros_like(hidden).index_add_(0, rows, dh)
    return dh, scaled(dweight[:V], dloss, weight.dtype), dbias[:V].mul_(dloss)


def _chunked(
    row_losses: RowLosses,
    h: Tensor,  # (R, C)
    operand: Tensor,  # (padded V, C)
    V: int,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    max_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with the logits built again, max_rows at a time; the weight's and bias's are summed in fp32."""
    parts, width = [], operand.shape[0]
    dweight = h.new_zeros(operand.shape if needs[1] else (0,), dtype=torch.float32)
    dbias = h.new_zeros(width if needs[2] else 0, dtype=torch.float32)
    for part, of in zip(h.split(max_rows), labels.split(max_rows), strict=True):
        logits = part @ operand.t()
        row_losses(logits, V, bias, of, ignore_index, logits)
        dpart, dw, db = linear.backward(logits, part, operand, needs, h.dtype)
        parts.append(dpart)
        dweight += dw
        dbias += db
    return torch.cat(parts), dweight, dbias
