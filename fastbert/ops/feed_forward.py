"""feed_forward: both GEMMs of an encoder layer around bias_gelu, saving the input and the pre-activation only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.bias_gelu import FORMS
from fastbert.backend.reference.feed_forward import eager
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


def _fwd_fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    save: bool,
    *_: Any,
) -> Any:
    u = x.new_empty(x.shape[0] if save else 0, w1.shape[0])
    return x.new_empty(x.shape[0], w2.shape[0]), u


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    w1: Tensor,
    w2: Tensor,
    approximate: str,
    needs: Sequence[bool],
    dtype: torch.dtype,
    *_: Any,
) -> Any:
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    dtypes = (x.dtype, dtype, sums(x), dtype, sums(x))
    return tuple(
        x.new_empty(s, dtype=d) if need else dy.new_empty(0)
        for s, d, need in zip(shapes, dtypes, needs, strict=True)
    )


_fwd = register(
    "feed_forward",
    "forward",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str approximate, bool save) -> (Tensor, Tensor)",
    _fwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="w1", rows="x"),
)
_bwd = register(
    "feed_forward",
    "backward",
    "(Tensor dy, Tensor x, Tensor u, Tensor w1, Tensor w2, str approximate, bool[] needs, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="dy", sizes="w1", rows="dy"),
)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        approximate: str,
        backend: str,
    ) -> Tensor:
        ctx.dtype = w1.dtype
        (w1,), (w2,) = shared(x, [w1]), shared(x, [w2])
        y, u = _fwd(x, w1, b1, w2, b2, approximate, True, backend)
        ctx.save_for_backward(x, u, w1, w2)
        ctx.approximate, ctx.backend = approximate, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs = list(ctx.needs_input_grad[:5])
        last = (ctx.approximate, needs, ctx.dtype, ctx.backend)
        grads = _bwd(dy.contiguous(), *ctx.saved_tensors, *last)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


@exported_as(eager)
def feed_forward(
    x: Tensor,  # (..., C)
    w1: Tensor,  # (F, C)
    b1: Tensor | None,  # (F,)
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    approximate: str = "none",
) -> Tensor:
    """gelu(x w1^T + b1) w2^T + b2 -> (..., C) in x's dtype, or autocast's.

    Saves x, the pre-activation (T, F) and the weights, on a GPU in x's dtype, for backward, which builds gelu again.
    Refuses shapes that don't fit, integer tensors. Vaswani et al. 2017, section 3.3.
    """
    _check.floating(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    _check.has_rows(x)
    _check.one_of("approximate", approximate, FORMS)
    _check.shape("w1", w1, -1, x.shape[-1])
    _check.shape("b1", b1, w1.shape[0])
    _check.shape("w2", w2, -1, w1.shape[0])
    _check.shape("b2", b2, w2.shape[0])
    _check.same_device(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    x = autocast(x)
    rows = as_rows(x)
    save = wants_grad(x, w1, b1, w2, b2)
    args = (rows, w1, b1, w2, b2, approximate)
    backend = choose("feed_forward", x.device, *args, save)
    y = record(_FeedForward, *args, backend) if save else _fwd(*args, False, backend)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w2.shape[0])
