"""cross_entropy: softmax cross-entropy of each row, by one online log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.cross_entropy import eager
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import (
    once_differentiable,
    record,
    register,
    wants_grad,
)
from fastbert.ops.context import exported_as


def _fwd_check(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    _check.labels_in_range(labels, logits.shape[1], ignore_index)


def _fwd_fake(logits: Tensor, *_: Any) -> Any:
    stat = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_empty(logits.shape[0], dtype=stat)
    return loss, torch.empty_like(loss)


def _bwd_fake(dloss: Tensor, logits: Tensor, *_: Any) -> Any:
    return torch.empty_like(logits)


_fwd = register(
    "cross_entropy",
    "forward",
    "(Tensor logits, Tensor labels, int ignore_index) -> (Tensor, Tensor)",
    _fwd_fake,
    _fwd_check,
    tuned_by=TunedBy(dtype="logits", sizes="logits", rows="logits", of_row=True),
)
_bwd = register(
    "cross_entropy",
    "backward",
    "(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int ignore_index) -> Tensor",
    _bwd_fake,
    tuned_by=TunedBy(dtype="logits", sizes="logits", rows="dloss", of_row=True),
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, backend: str
    ) -> Tensor:
        loss, lse = _fwd(logits, labels, ignore_index, backend)
        ctx.save_for_backward(logits, labels, lse)
        ctx.ignore_index, ctx.backend = ignore_index, backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        grad = _bwd(dloss.contiguous(), *ctx.saved_tensors, ctx.ignore_index, ctx.backend)
        return grad, None, None, None


@exported_as(eager)
def cross_entropy(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,) int
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of logits against class ids; fp32 (fp64 for fp64 logits).

    reduction: "mean" over the labelled rows (NaN if there is none, as stock), "sum", or "none" for one loss a row, 0
    where ignored. Saves logits and lse for backward, which allocates dlogits and writes into nothing else. Refuses
    shapes that don't fit, and on the CPU labels out of range (IndexError).
    """
    _check.floating(logits=logits)
    _check.integer(labels=labels)
    _check.shape("logits", logits, -1, -1)
    _check.shape("labels", labels, logits.shape[0])
    if logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: there is no class to choose")
    _check.one_of("reduction", reduction, ("mean", "sum", "none"))
    _check.same_device(logits=logits, labels=labels)
    logits = logits.contiguous()
    backend = choose("cross_entropy", logits.device, logits, labels, ignore_index)
    if wants_grad(logits):
        losses = record(_CrossEntropy, logits, labels, ignore_index, backend)
    else:
        losses = _fwd(logits, labels, ignore_index, backend)[0]
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (labels != ignore_index).sum()
