"""cross_entropy on the native CPU kernel, csrc/cpu/cross_entropy.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cpu import (
    DTYPES,
    address,
    fresh,
    int64,
    native,
    row_losses,
    unsupported_dtype,
)


def unsupported(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("logits", logits)


def forward(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The loss of each row and lse, (N,) fp32, both 0 in ignored rows."""
    return row_losses(native.cross_entropy_fwd, logits, labels, ignore_index)


def backward(
    dloss: Tensor,  # (N,)
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    ignore_index: int,
) -> Tensor:
    """dlogits (N, V) in logits' dtype, 0 in ignored rows."""
    count, size = logits.shape
    dlogits = fresh(logits, *logits.shape)
    if count > 0:
        labels64 = int64(labels)
        native.cross_entropy_bwd(
            DTYPES[logits.dtype],
            dloss.data_ptr(),
            logits.data_ptr(),
            address(labels64),
            dlogits.data_ptr(),
            count,
            size,
            ignore_index,
            torch.get_num_threads(),
        )
    return dlogits
