"""mlm_loss: the library's GEMMs on labelled rows, and Triton's softmax that turns logits into their gradient in place.

The GEMMs take a vocabulary padded to a multiple of 8 elements, by rows of zeros in the copy of the weight that is cast
anyway: with BERT's 30522 the library would read 4 bytes at a time. The softmax adds the bias and writes zeros there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import cross_entropy, unsupported_dtype
from fastbert.kernels._launch import FUSED
from fastbert.stock import linear as library
from fastbert.stock.linear import cast


@triton.jit
def _mlm_loss_bwd_scale_kernel(
    x_ptr,  # (count,)
    scale_ptr,  # (), fp32
    y_ptr,  # (count,), may be x
    count,
    BLOCK: tl.constexpr,
):
    # y = x scale in y's dtype
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, x * tl.load(scale_ptr), mask=at < count)


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x scale in this dtype by one pass, in x's memory where that is its dtype; scale stays on the device."""
    y = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        grid = (triton.cdiv(x.numel(), 2048),)
        _mlm_loss_bwd_scale_kernel[grid](x, scale, y, x.numel(), BLOCK=2048, num_warps=8, **FUSED)
    return y


def _padded(V: int) -> int:
    """The width of a row of V logits in memory; fastbert/ops/mlm_loss.py allocates by the same rule for tracers."""
    return -(-V // 8) * 8


def _operand(h: Tensor, weight: Tensor) -> Tensor:
    """The weight in h's dtype, its rows padded by zeros (padded V, C)."""
    V, C = weight.shape
    if _padded(V) == V:
        return cast(h, weight, None)[0]
    operand = h.new_empty(_padded(V), C)
    operand[:V].copy_(weight)
    operand[V:].zero_()
    return operand


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
    operand = _operand(h, weight)
    kept = save and labels.shape[0] <= max_rows
    losses, lses, logits = [], [], h.new_empty(0, operand.shape[0])
    for part, of in zip(h.split(max_rows), labels.split(max_rows), strict=True):
        logits = part @ operand.t()
        loss, lse = cross_entropy.row_losses(
            logits, V, bias, of, ignore_index, logits if kept else None
        )
        losses.append(loss)
        lses.append(lse)
    return torch.cat(losses).sum(), torch.cat(lses), logits if kept else logits[:0].clone()


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
    operand = _operand(h, weight)
    if labels.shape[0] <= max_rows:
        dh, dweight, dbias = library.backward(dlogits, h, operand, needs, h.dtype)
    else:
        dh, dweight, dbias = _chunked(h, operand, V, bias, labels, ignore_index, max_rows, needs)
    dh = _scaled(dh, dloss, dh.dtype)
    if needs[0] and rows is not None:
        dh = torch.zeros_like(hidden).index_copy_(0, rows.long(), dh)
    return dh, _scaled(dweight[:V], dloss, weight.dtype), dbias[:V].mul_(dloss)


def _chunked(
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
        cross_entropy.row_losses(logits, V, bias, of, ignore_index, logits)
        dpart, dw, db = library.backward(logits, part, operand, needs, h.dtype)
        parts.append(dpart)
        dweight += dw
        dbias += db
    return torch.cat(parts), dweight, dbias
