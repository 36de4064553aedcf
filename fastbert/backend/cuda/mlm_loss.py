"""mlm_loss: the library's GEMMs on labelled rows, and our softmax that turns logits into their gradient in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend import _gpu_mlm_loss
from fastbert.backend.cuda import cross_entropy, unsupported_dtype


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.mul_(scale).to(dtype)


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
