"""mlm_loss: the library's GEMMs on labelled rows; Triton's softmax overwrites the logits with their gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.backend import _gpu_mlm_loss
from fastbert.kernels import cross_entropy, unsupported_dtype
from fastbert.kernels._launch import FUSED


@triton.jit
def _mlm_loss_bwd_scale_kernel(
    x_ptr,  # (count,)
    scale_ptr,  # (), fp32
    y_ptr,  # (count,), may be x_ptr
    count,
    BLOCK: tl.constexpr,
):
    # y = x scale in y's dtype
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, x * tl.load(scale_ptr), mask=at < count)


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x scale in this dtype by one pass, in place if x has this dtype; scale is read on the device."""
    y = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        grid = (triton.cdiv(x.numel(), 2048),)
        _mlm_loss_bwd_scale_kernel[grid](x, scale, y, x.numel(), BLOCK=2048, num_warps=8, **FUSED)
    return y


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
    args = (hidden, weight, bias, labels, rows, ignore_index, max_rows, save)
    return _gpu_mlm_loss.forward(cross_entropy.row_losses, *args)


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
    args = (dloss, hidden, weight, bias, labels, rows, lse, dlogits, ignore_index, max_rows, needs)
    return _gpu_mlm_loss.backward(cross_entropy.row_losses, _scaled, *args)
