"""mlm_loss: decoder and softmax cross-entropy of the masked LM on labelled rows only, never a (T, V) tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose, offered
from fastbert.backend.reference.mlm_loss import eager
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import once_differentiable, record, register, sums, wants_grad
from fastbert.ops.context import autocast, exported_as

# above this many labelled rows the logits are built again in backward, a chunk at a time, instead of being kept
MAX_ROWS = 8192


def _fwd_check(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    labels: Tensor,
    rows: Tensor | None,
    ignore: int,
    *_: Any,
) -> None:
    _check.labels_in_range(labels, weight.shape[0], ignore)
    if rows is not None:
        _check.ids_in_range("rows", rows, hidden.shape[0], "rows number the rows of hidden")


def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    labels: Tensor,
    rows: Any,
    ignore: int,
    max_rows: int,
    save: bool,
    backend: str,
) -> Any:
    stat = sums(hidden)
    kept = labels.shape[0] if save and labels.shape[0] <= max_rows else 0
    lse = hidden.new_empty(labels.shape[0], dtype=stat)
    return hidden.new_empty((), dtype=stat), lse, hidden.new_empty(kept, _width(weight, backend))


def _width(weight: Tensor, backend: str) -> int:
    """Elements in a row of p - onehot: V, or more where the backend aligns its rows."""
    width, V = offered(backend, "loss_width"), weight.shape[0]
    return V if width is None else width(V)


def _bwd_fake(dloss: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
    needs: Sequence[bool] = rest[-2]
    empty = hidden.new_empty
    return (
        torch.empty_like(hidden) if needs[0] else empty(0),
        torch.empty_like(weight) if needs[1] else empty(0, dtype=weight.dtype),
        empty(weight.shape[0] if needs[2] else 0, dtype=sums(hidden)),
    )


_fwd = register(
    "mlm_loss",
    "forward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows, int ignore_index, "
    "int max_rows, bool save) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_check,
    tuned_by=TunedBy(dtype="hidden", sizes="weight", rows="labels"),
)
_bwd = register(
    "mlm_loss",
    "backward",
    "(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows, Tensor lse, "
    "Tensor dlogits, int ignore_index, int max_rows, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="hidden", sizes="weight", rows="labels"),
)


class _MLMLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
    ) -> Tensor:
        labels, rows, ignore_index, max_rows, backend = args
        loss, lse, dlogits = _fwd(hidden, weight, bias, *args[:-1], True, backend)
        ctx.save_for_backward(hidden, weight, bias, labels, rows, lse, dlogits)
        ctx.scalars = (ignore_index, max_rows, backend)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        ignore_index, max_rows, backend = ctx.scalars
        needs = list(ctx.needs_input_grad[:3])
        grads = _bwd(dloss, *ctx.saved_tensors, ignore_index, max_rows, needs, backend)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 5


@exported_as(eager)
def mlm_loss(
    hidden: Tensor,  # (T, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int
    *,
    rows: Tensor | None = None,  # (R,) int64
    compacted: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    max_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of hidden weight^T + bias against labels, computed for the labelled rows only -> fp32 scalar.

    `rows` are the labelled rows, each once, if the caller knows them, which saves the host sync of finding them;
    `compacted` says that hidden and labels hold labelled rows already. reduction: "mean" over the labelled rows, 0 and
    connected to the graph if there is none, or "sum". Saves hidden, weight, lse and p - onehot of the labelled rows
    (the last only up to `max_rows` rows, default MAX_ROWS; above it, it is built again by chunks). Under autocast
    hidden is cast.
    Refuses shapes that don't fit, and on the CPU labels and rows out of range (IndexError). Devlin et al. 2018.
    """
    _check.floating(hidden=hidden, weight=weight, bias=bias)
    _check.integer(labels=labels, rows=rows)
    _check.shape("hidden", hidden, -1, -1)
    if 0 in (hidden.shape[1], weight.shape[0]):
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}: C and V must not be 0"
        )
    _check.shape("weight", weight, -1, hidden.shape[1])
    _check.shape("bias", bias, weight.shape[0])
    _check.shape("labels", labels, hidden.shape[0])
    _check.one_of("reduction", reduction, ("mean", "sum"))
    _check.same_device(hidden=hidden, weight=weight, bias=bias, labels=labels, rows=rows)
    if max_rows is None:
        max_rows = MAX_ROWS
    elif max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}: it must be at least 1, or None for {MAX_ROWS}")
    if rows is None and not compacted:
        rows = (labels != ignore_index).nonzero()[:, 0]
    if rows is not None:
        _check.shape("rows", rows, -1)
        labels = labels[rows]
    hidden = autocast(hidden).contiguous()
    args = (hidden, weight, bias, labels, rows, ignore_index, max_rows)
    save = wants_grad(hidden, weight, bias)
    backend = choose("mlm_loss", hidden.device, *args, save)
    total = record(_MLMLoss, *args, backend) if save else _fwd(*args, False, backend)[0]
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)
