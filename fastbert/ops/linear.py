"""linear: x weight^T + bias, every GEMM of the model that is not fused with anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.linear import eager
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import (
    as_rows,
    once_differentiable,
    record,
    register,
    shared,
    sums,
    wants_grad,
)
from fastbert.ops.context import autocast, exported_as


def _fwd_fake(x: Tensor, weight: Tensor, *_: Any) -> Any:
    return x.new_empty(x.shape[0], weight.shape[0])


def _bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], dtype: torch.dtype, *_: Any
) -> Any:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dtypes = (x.dtype, dtype, sums(x))
    return tuple(
        x.new_empty(s, dtype=d) if need else dy.new_empty(0)
        for s, d, need in zip(shapes, dtypes, needs, strict=True)
    )


_fwd = register(
    "linear",
    "forward",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _fwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="weight", rows="x"),
)
_bwd = register(
    "linear",
    "backward",
    "(Tensor dy, Tensor x, Tensor weight, bool[] needs, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="dy", sizes="weight", rows="dy"),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        (copy,) = shared(x, [weight])
        ctx.save_for_backward(x, copy)
        ctx.dtype, ctx.backend = weight.dtype, backend
        return _fwd(x, copy, bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads = _bwd(dy.contiguous(), x, weight, needs, ctx.dtype, ctx.backend)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


@exported_as(eager)
def linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
) -> Tensor:
    """x weight^T + bias -> (..., N) in x's dtype, or autocast's; the weights may be of another dtype.

    Saves x and weight, on a GPU in x's dtype, for backward and computes only the gradients that are needed. Refuses
    shapes that don't fit and integer tensors.
    """
    _check.floating(x=x, weight=weight, bias=bias)
    _check.has_rows(x)
    _check.shape("weight", weight, -1, x.shape[-1])
    _check.shape("bias", bias, weight.shape[0])
    _check.same_device(x=x, weight=weight, bias=bias)
    x = autocast(x)
    rows = as_rows(x)
    backend = choose("linear", x.device, rows, weight, bias)
    if wants_grad(x, weight, bias):
        y = record(_Linear, rows, weight, bias, backend)
    else:
        y = _fwd(rows, weight, bias, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
