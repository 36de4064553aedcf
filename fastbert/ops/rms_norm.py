"""rms_norm: the drop-in for torch.nn.functional.rms_norm over the last dimension."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.backend.chooser import choose
from fastbert.backend.reference.rms_norm import eager
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import (
    as_rows,
    as_shape,
    none_if_empty,
    once_differentiable,
    record,
    register,
    sums,
    through_torch,
    wants_grad,
)
from fastbert.ops.context import exported_as


def _fwd_fake(x: Tensor, *_: Any) -> Any:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=sums(x))


def _bwd_fake(dy: Tensor, x: Tensor, weight: Tensor | None, *_: Any) -> Any:
    dweight = dy.new_empty(0) if weight is None else torch.empty_like(weight)
    return torch.empty_like(x), dweight


_fwd = register(
    "rms_norm",
    "forward",
    "(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    _fwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="x", rows="x", of_row=True),
)
_bwd = register(
    "rms_norm",
    "backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="x", rows="dy", of_row=True),
)


def _twice(ctx: Any, dy: Tensor) -> Any:
    """The backward in plain torch, whose own derivative torch knows."""

    def forward(x: Tensor, weight: Tensor | None) -> Tensor:
        return tnf.rms_norm(x, x.shape[1:], weight, ctx.eps)

    return *through_torch(forward, ctx.saved_tensors[:2], dy), None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, backend: str) -> Tensor:
        y, rstd = _fwd(x, weight, eps, backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.backend = eps, backend
        return y

    @staticmethod
    @partial(once_differentiable, twice=_twice)
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx, dweight = _bwd(dy.contiguous(), *ctx.saved_tensors, ctx.backend)
        return dx, none_if_empty(dweight), None, None


@exported_as(eager)
def rms_norm(
    x: Tensor,  # (..., C)
    weight: Tensor | None = None,  # (C,)
    eps: float | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, returned in x's dtype, under autocast too.

    fp32, bf16, fp16 (fp64 through `torch` and `reference`); the statistic is fp32. Without eps it is the machine
    epsilon of the statistic's dtype, as in torch. Saves x and rstd for backward. Refuses integer tensors and a weight
    that is not (C,). Zhang, Sennrich 2019.
    """
    _check.floating(x=x, weight=weight)
    _check.has_rows(x)
    eps = torch.finfo(sums(x)).eps if eps is None else eps
    _check.epsilon(eps)
    _check.shape("weight", weight, x.shape[-1])
    _check.same_device(x=x, weight=weight)
    rows = as_rows(x)
    backend = choose("rms_norm", x.device, rows, weight, eps)
    if wants_grad(x, weight):
        y = record(_RMSNorm, rows, weight, eps, backend)
    else:
        y = _fwd(rows, weight, eps, backend)[0]
    return as_shape(y, x.shape)
