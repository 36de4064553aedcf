"""mlm_loss: the library's GEMMs on labelled rows, and our softmax that turns logits into their gradient in place.

Rows of logits lie 8 elements' multiples apart: BERT's 30522 in bf16 would be aligned to 4 bytes only, which keeps the
library's GEMMs from their wide loads. The bias is added inside the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.cuda import cross_entropy, linear, unsupported_dtype
from fastbert.stock.linear import cast


def _padded(V: int) -> int:
    """The width of a row of V logits in memory; fastbert/ops/mlm_loss.py allocates by the same rule for tracers."""
    return -(-V // 8) * 8


def _picked(hidden: Tensor, rows: Tensor | None) -> Tensor:
    return hidden if rows is None else hidden.index_select(0, rows)


def unsupported(
    hidden: Tensor,  # (T, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,)
    rows: Tensor | None,  # (R,)
    ignore_index: int,
    max_rows: int,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(hidden=hidden, weight=weight)


def _logits(h: Tensor, weight: Tensor) -> Tensor:
    """h weight^T (R, V) without the bias, as the left part of a buffer whose rows are aligned."""
    V = weight.shape[0]
    buffer = h.new_empty(h.shape[0], _padded(V))
    torch.mm(h, cast(h, weight, None)[0].t(), out=buffer[:, :V])
    return buffer


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
    """The summed loss (), lse (R,), both fp32, and p - onehot (R, padded V), empty without `save` or above max_rows."""
    h, V = _picked(hidden, rows), weight.shape[0]
    kept = save and labels.shape[0] <= max_rows
    losses, lses, buffer = [], [], hidden.new_empty(0, _padded(V))
    for part, of in zip(h.split(max_rows), labels.split(max_rows), strict=True):
        buffer = _logits(part, weight)
        loss, lse = cross_entropy.row_losses(
            buffer, V, bias, of, ignore_index, buffer if kept else None
        )
        losses.append(loss)
        lses.append(lse)
    return torch.cat(losses).sum(), torch.cat(lses), buffer if kept else buffer[:0].clone()


def backward(
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
    h, V = _picked(hidden, rows), weight.shape[0]
    if labels.shape[0] <= max_rows:
        dh, dweight, dbias = linear.backward(dlogits[:, :V], h, weight, needs)
    else:
        dh, dweight, dbias = _chunked(h, weight, bias, labels, ignore_index, max_rows, needs)
    if needs[0] and rows is not None:
        dh = torch.zeros_like(hidden).index_add_(0, rows, dh)
    return dh.mul_(dloss), dweight.mul_(dloss), dbias.mul_(dloss)


def _chunked(
    h: Tensor,  # (R, C)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    max_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with the logits built again, max_rows at a time; the weight's and bias's are summed in fp32."""
    V, parts = weight.shape[0], []
    dweight = h.new_zeros(weight.shape if needs[1] else (0,), dtype=torch.float32)
    dbias = h.new_zeros(V if needs[2] else 0, dtype=torch.float32)
    for part, of in zip(h.split(max_rows), labels.split(max_rows), strict=True):
        buffer = _logits(part, weight)
        cross_entropy.row_losses(buffer, V, bias, of, ignore_index, buffer)
        dpart, dw, db = linear.backward(buffer[:, :V], part, weight, needs)
        parts.append(dpart)
        dweight += dw
        dbias += db
    return torch.cat(parts), dweight.to(weight.dtype), dbias
