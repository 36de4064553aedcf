"""cross_entropy on the CUDA kernel, csrc/cuda/cross_entropy.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cuda import (
    DTYPES,
    address,
    code,
    int64,
    native,
    parameter,
    place,
    unsupported_dtype,
)


def unsupported(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(logits=logits)


def forward(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, 0 in ignored ones, and lse, (N,) fp32."""
    return row_losses(logits, logits.shape[1], None, labels, ignore_index, None)


def row_losses(
    logits: Tensor,  # (N, width), of which the first V columns count
    V: int,
    bias: Tensor | None,  # (V,), added to every row
    labels: Tensor,  # (N,)
    ignore_index: int,
    gradient: Tensor | None,  # like logits, or logits itself
) -> tuple[Tensor, Tensor]:
    """The loss of each row and lse, (N,) fp32; `gradient` takes softmax - onehot, 0 in ignored rows."""
    loss, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    _softmax(logits, V, bias, labels, None, loss, lse, gradient, ignore_index)
    return loss, lse


def backward(
    dloss: Tensor,  # (N,)
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    ignore_index: int,
) -> Tensor:
    """dlogits (N, V) in logits' dtype, 0 in ignored rows."""
    dlogits = torch.empty_like(logits)
    dloss = dloss.to(torch.float32).contiguous()
    _softmax(logits, logits.shape[1], None, labels, dloss, None, None, dlogits, ignore_index)
    return dlogits


def _softmax(
    logits: Tensor,
    V: int,
    bias: Tensor | None,
    labels: Tensor,
    dloss: Tensor | None,
    loss: Tensor | None,
    lse: Tensor | None,
    gradient: Tensor | None,
    ignore_index: int,
) -> None:
    """Launch the kernel of both directions; it writes the outputs that are given."""
    N, width = logits.shape
    if N == 0:
        return
    bias, labels64 = parameter(bias, logits.dtype), int64(labels)
    native.cross_entropy(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        address(bias),
        code(bias),
        address(labels64),
        address(dloss),
        address(loss),
        address(lse),
        address(gradient),
        ignore_index,
        N,
        V,
        width,
        *place(logits),
    )
