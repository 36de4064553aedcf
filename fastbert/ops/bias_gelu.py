"""bias_gelu: gelu(x + bias), with dbias in the same backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.bias_gelu import FORMS, eager
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import (
    as_rows,
    as_shape,
    none_if_empty,
    once_differentiable,
    record,
    register,
    through_torch,
    wants_grad,
)
from fastbert.ops.context import autocast, exported_as


def _fwd_fake(x: Tensor, bias: Tensor | None, *_: Any) -> Any:
    return torch.empty_like(x)


def _bwd_fake(dy: Tensor, x: Tensor, bias: Tensor | None, *_: Any) -> Any:
    return torch.empty_like(x), dy.new_empty(0) if bias is None else torch.empty_like(bias)


_fwd = register(
    "bias_gelu",
    "forward",
    "(Tensor x, Tensor? bias, str approximate) -> Tensor",
    _fwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="x", rows="x", of_row=True),
)
_bwd = register(
    "bias_gelu",
    "backward",
    "(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="x", rows="dy", of_row=True),
)


def _twice(ctx: Any, dy: Tensor) -> Any:
    """The backward in plain torch, whose own derivative torch knows."""

    def forward(x: Tensor, bias: Tensor | None) -> Tensor:
        return eager(x, bias, ctx.approximate)

    return *through_torch(forward, ctx.saved_tensors, dy), None, None


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, approximate: str, backend: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate, ctx.backend = approximate, backend
        return _fwd(x, bias, approximate, backend)

    @staticmethod
    @partial(once_differentiable, twice=_twice)
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx, dbias = _bwd(dy.contiguous(), *ctx.saved_tensors, ctx.approximate, ctx.backend)
        return dx, none_if_empty(dbias), None, None


@exported_as(eager)
def bias_gelu(
    x: Tensor,  # (..., F)
    bias: Tensor | None = None,  # (F,)
    approximate: str = "none",
) -> Tensor:
    """gelu(x + bias) in x's dtype, or autocast's: exact by erf, or the form that `approximate` names.

    "tanh" is the tanh form, "sigmoid" u sigmoid(1.702 u), which CLIP has.
    Saves x and bias for backward, which gives dx and dbias in one pass. Refuses integer tensors and a bias that is not
    (F,). Hendrycks, Gimpel 2016.
    """
    _check.floating(x=x, bias=bias)
    _check.one_of("approximate", approximate, FORMS)
    if bias is not None:
        _check.shape("bias", bias, x.shape[-1] if x.dim() else 1)
    _check.same_device(x=x, bias=bias)
    x = autocast(x)
    # a scalar is a row of one, for the GELU drop-in
    rows = as_rows(x if x.dim() else x.reshape(1))
    backend = choose("bias_gelu", x.device, rows, bias, approximate)
    if wants_grad(x, bias):
        y = record(_BiasGelu, rows, bias, approximate, backend)
    else:
        y = _fwd(rows, bias, approximate, backend)
    return as_shape(y, x.shape)
