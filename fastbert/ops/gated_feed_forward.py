"""gated_feed_forward: an encoder's feed-forward with a gate, saving the input and both pre-activations only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.gated_feed_forward import eager
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
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    save: bool,
    *_: Any,
) -> Any:
    u = x.new_empty(x.shape[0] if save else 0, 2 * w2.shape[1])
    return x.new_empty(x.shape[0], w2.shape[0]), u


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    w1: Sequence[Tensor],
    w2: Tensor,
    activation: str,
    needs: Sequence[bool],
    dtype: torch.dtype,
    *_: Any,
) -> Any:
    both = u.shape[1]
    shapes = (x.shape, (both, x.shape[1]), (both,), w2.shape, w2.shape[:1])
    dtypes = (x.dtype, dtype, sums(x), dtype, sums(x))
    return tuple(
        x.new_empty(s, dtype=d) if need else dy.new_empty(0)
        for s, d, need in zip(shapes, dtypes, needs, strict=True)
    )


_fwd = register(
    "gated_feed_forward",
    "forward",
    "(Tensor x, Tensor[] w1, Tensor[] b1, Tensor w2, Tensor? b2, str activation, bool save) -> (Tensor, Tensor)",
    _fwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="w1", rows="x"),
)
_bwd = register(
    "gated_feed_forward",
    "backward",
    "(Tensor dy, Tensor x, Tensor u, Tensor[] w1, Tensor w2, str activation, bool[] needs, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="dy", sizes="w1", rows="dy"),
)


class _GatedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w2: Tensor,
        b2: Tensor | None,
        activation: str,
        parts: int,
        backend: str,
        *halves: Tensor,
    ) -> Tensor:
        w1, b1 = list(halves[:parts]), list(halves[parts:])
        ctx.dtype = w1[0].dtype
        w1, (w2,) = shared(x, w1), shared(x, [w2])
        y, u = _fwd(x, w1, b1, w2, b2, activation, True, backend)
        ctx.save_for_backward(x, u, w2, *w1)
        ctx.activation, ctx.parts, ctx.backend = activation, parts, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, u, w2, *w1 = ctx.saved_tensors
        of_x, of_w2, of_b2, _, _, _, *halves = ctx.needs_input_grad
        of_w1, of_b1 = halves[: ctx.parts], halves[ctx.parts :]
        needs = [of_x, any(of_w1), any(of_b1), of_w2, of_b2]
        last = (ctx.activation, needs, ctx.dtype, ctx.backend)
        dx, dw1, db1, dw2, db2 = _bwd(dy.contiguous(), x, u, w1, w2, *last)
        grads: list[Tensor | None] = []
        for whole, each in ((dw1, of_w1), (db1, of_b1)):
            parts = whole.chunk(len(each)) if any(each) else (None,) * len(each)
            grads += [part if need else None for part, need in zip(parts, each, strict=True)]
        first = zip((dx, dw2, db2), (of_x, of_w2, of_b2), strict=True)
        return *(g if need else None for g, need in first), None, None, None, *grads


def _check_all(
    x: Tensor,
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
) -> None:
    if len(w1) not in (1, 2):
        raise ValueError(f"w1 holds {len(w1)} tensors: pass one (2F, C) or two (F, C)")
    if len(b1) not in (0, len(w1)):
        raise ValueError(f"b1 holds {len(b1)} tensors for {len(w1)} in w1: pass as many, or None")
    weights = {f"w1[{i}]": w for i, w in enumerate(w1)}
    biases = {f"b1[{i}]": b for i, b in enumerate(b1)}
    tensors = {"x": x, **weights, **biases, "w2": w2, "b2": b2}
    _check.floating(**tensors)
    _check.has_rows(x)
    _check.one_of("activation", activation, ("gelu", "gelu_tanh", "silu"))
    rows = w1[0].shape[0] if w1[0].dim() else 0
    if len(w1) == 1 and rows % 2:
        raise ValueError(f"w1[0] has {rows} rows: half of them are activated, pass an even number")
    for name, w in weights.items():
        _check.shape(name, w, rows, x.shape[-1])
    for name, b in biases.items():
        _check.shape(name, b, rows)
    _check.shape("w2", w2, -1, rows * len(w1) // 2)
    _check.shape("b2", b2, w2.shape[0])
    _check.same_device(**tensors)
    if len({w.dtype for w in w1}) > 1:
        raise TypeError(f"w1 holds {w1[0].dtype} and {w1[1].dtype}: use one dtype for both")


@exported_as(eager)
def gated_feed_forward(
    x: Tensor,  # (..., C)
    w1: Sequence[Tensor],  # [(2F, C)] or 2 of (F, C)
    b1: Sequence[Tensor] | None,  # likewise
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    activation: str = "gelu",
) -> Tensor:
    """(act(a) * g) w2^T + b2 -> (..., C) in x's dtype, or autocast's, with [a, g] = x w1^T + b1.

    The first F rows of w1, or the first of two weights, give a. `activation` is "gelu", "gelu_tanh" or "silu". Saves x,
    the pre-activations (T, 2F) and the weights, on a GPU in x's dtype, for backward, which builds act(a) * g again.
    Refuses shapes that don't fit, integer tensors, any other number of weights. Shazeer 2020, GLU variants improve
    Transformer.
    """
    w1, b1 = list(w1), [] if b1 is None else list(b1)
    _check_all(x, w1, b1, w2, b2, activation)
    x = autocast(x)
    rows = as_rows(x)
    save = wants_grad(x, *w1, *b1, w2, b2)
    args = (rows, w1, b1, w2, b2, activation)
    backend = choose("gated_feed_forward", x.device, *args, save)
    if save:
        y = record(_GatedFeedForward, rows, w2, b2, activation, len(w1), backend, *w1, *b1)
    else:
        y = _fwd(*args, False, backend)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w2.shape[0])
