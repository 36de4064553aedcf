"""layer_norm: the drop-in for torch.nn.functional.layer_norm over the last dimension."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.backend.chooser import choose
from fastbert.backend.reference.layer_norm import eager
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


def row_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty mean and rstd of the rows of x (N, C): fp32, or fp64 where x is."""
    return x.new_empty(x.shape[0], dtype=sums(x)), x.new_empty(x.shape[0], dtype=sums(x))


def _fwd_fake(x: Tensor, *_: Any) -> Any:
    return torch.empty_like(x), *row_stats(x)


def _bwd_fake(dy: Tensor, x: Tensor, weight: Tensor | None, *_: Any) -> Any:
    if weight is None:
        return torch.empty_like(x), dy.new_empty(0), dy.new_empty(0)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight, dtype=sums(x))


_fwd = register(
    "layer_norm",
    "forward",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="x", rows="x", of_row=True),
)
_bwd = register(
    "layer_norm",
    "backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="x", rows="dy", of_row=True),
)


def _twice(ctx: Any, dy: Tensor) -> Any:
    """The backward in plain torch, whose own derivative torch knows; None where the input was not saved."""
    if ctx.from_output:
        return None

    def forward(x: Tensor, weight: Tensor | None) -> Tensor:
        return tnf.layer_norm(x, x.shape[1:], weight, None, ctx.eps)

    dx, dweight = through_torch(forward, ctx.saved_tensors[:2], dy)
    return dx, dweight, dy.sum(0) if ctx.has_bias else None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        from_output: bool,
        backend: str,
    ) -> Tensor:
        y, mean, rstd = _fwd(x, weight, bias, eps, backend)
        kept, shift = (y, bias) if from_output else (x, None)
        ctx.save_for_backward(kept, weight, mean, rstd, shift)
        ctx.has_bias, ctx.backend = bias is not None, backend
        ctx.eps, ctx.from_output = eps, from_output
        return y

    @staticmethod
    @partial(once_differentiable, twice=_twice)
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx, dweight, dbias = _bwd(dy.contiguous(), *ctx.saved_tensors, ctx.backend)
        return dx, none_if_empty(dweight), dbias if ctx.has_bias else None, None, None, None


@exported_as(eager)
def layer_norm(
    x: Tensor,  # (..., C)
    weight: Tensor | None = None,  # (C,)
    bias: Tensor | None = None,  # (C,)
    eps: float = 1e-5,
    *,
    from_output: bool = False,
) -> Tensor:
    """LayerNorm over the last dimension, returned in x's dtype, under autocast too.

    fp32, bf16, fp16 (fp64 through `torch` and `reference`); statistics are fp32. Saves x, mean and rstd for backward.
    With `from_output`, as in dropout_add_layer_norm, it saves the output instead of x; weight and bias are required.
    Refuses integer tensors, a weight or bias that is not (C,), a bias without a weight. Ba, Kiros, Hinton 2016.
    """
    _check.floating(x=x, weight=weight, bias=bias)
    _check.has_rows(x)
    _check.epsilon(eps)
    C = x.shape[-1]
    _check.shape("weight", weight, C)
    _check.shape("bias", bias, C)
    if bias is not None and weight is None:
        raise ValueError("bias is given without weight: pass a weight of ones")
    if from_output and bias is None:
        raise ValueError("from_output is set without weight and bias: pass both, or ones and zeros")
    _check.same_device(x=x, weight=weight, bias=bias)
    rows = as_rows(x)
    backend = choose("layer_norm", x.device, rows, weight, bias, eps)
    if wants_grad(x, weight, bias):
        y = record(_LayerNorm, rows, weight, bias, eps, from_output, backend)
    else:
        y = _fwd(rows, weight, bias, eps, backend)[0]
    return as_shape(y, x.shape)
