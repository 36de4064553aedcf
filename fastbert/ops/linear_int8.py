"""linear_int8: x weight^T + bias with an int8 weight and rows of x rounded to 12 or 8 bits, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.linear_int8 import LARGEST_WEIGHT, LEVELS, eager, most_columns
from fastbert.backend.tuned import TunedBy
from fastbert.files import quoted
from fastbert.ops import _check
from fastbert.ops._register import (
    as_rows,
    once_differentiable,
    record,
    register,
    sums,
    wants_grad,
)
from fastbert.ops.context import autocast, exported_as


def _fwd_check(x: Tensor, weight: Tensor, scale: Tensor, bias: Any, bits: int) -> None:
    most = most_columns(bits, LARGEST_WEIGHT + 1)
    if x.shape[1] > most and weight.numel() and int(weight.amin()) < -LARGEST_WEIGHT:
        raise ValueError(
            f"weight has the integer -128 and {x.shape[1]} columns: sums of {bits}-bit numbers could leave 32 bits, "
            f"pass -{LARGEST_WEIGHT} to {LARGEST_WEIGHT}, or up to {most} columns"
        )


def _fwd_fake(x: Tensor, weight: Tensor, *_: Any) -> Any:
    return x.new_empty(x.shape[0], weight.shape[0])


def _bwd_fake(dy: Tensor, weight: Tensor, scale: Tensor, needs: Sequence[bool], *_: Any) -> Any:
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if needs[0] else dy.new_empty(0)
    dbias = dy.new_empty(weight.shape[0], dtype=sums(dy)) if needs[1] else dy.new_empty(0)
    return dx, dbias


_fwd = register(
    "linear_int8",
    "forward",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits) -> Tensor",
    _fwd_fake,
    _fwd_check,
    tuned_by=TunedBy(dtype="x", sizes="weight", rows="x"),
)
_bwd = register(
    "linear_int8",
    "backward",
    "(Tensor dy, Tensor weight, Tensor scale, bool[] needs) -> (Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="dy", sizes="weight", rows="dy"),
)


class _LinearInt8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        bits: int,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.backend = backend
        return _fwd(x, weight, scale, bias, bits, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
        dx, dbias = _bwd(dy.contiguous(), weight, scale, needs, ctx.backend)
        dx, dbias = (g if need else None for g, need in zip((dx, dbias), needs, strict=True))
        return dx, None, None, dbias, None, None


def _check_integers(weight: Tensor, scale: Tensor, bits: int, columns: int) -> None:
    """Refuse a weight that is not int8, a scale of low precision, other bits, and rows whose sums could overflow."""
    if weight.dtype != torch.int8:
        raise TypeError(
            f"weight is {weight.dtype}: pass torch.int8 and the scale of each row, or use linear"
        )
    if scale.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scale is {scale.dtype}: pass float32, one number for each row of weight")
    if not isinstance(bits, int) or bits not in LEVELS:
        raise ValueError(f"bits is {quoted(bits)}: choose 12 or 8")
    if columns > (most := most_columns(bits)):
        remedy = f"use 8 bits, up to {most_columns(8)}, or linear" if bits == 12 else "use linear"
        raise ValueError(
            f"x has {columns} columns: sums of {bits}-bit numbers fit into 32 bits up to {most}, {remedy}"
        )


@exported_as(eager)
def linear_int8(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,) fp32
    bias: Tensor | None = None,  # (N,)
    bits: int = 12,
) -> Tensor:
    """x (weight scale)^T + bias -> (..., N) in x's dtype, or autocast's, from exact sums of integers.

    Each row of x is rounded to integers of 12 bits (8 with bits=8) times a factor, so that its largest element is 2047
    (127). The result of a row depends on the row alone: not on the batch, padding or threads. The sums are the same
    integers on every instruction set and device. A row with NaN or inf gives NaN.

    To autograd the rounding is the identity: dx = (dy scale) weight. weight and scale get no gradient. Saves both for
    backward. Refuses shapes that don't fit, a weight of another dtype, and K above 8260 (12 bits) or 133144 (8 bits),
    where a sum could leave 32 bits; on the CPU K above 8196 or 132104 too, where the weight has -128.
    """
    _check.given(x=x, weight=weight, scale=scale)
    _check.floating(x=x, bias=bias)
    _check.has_rows(x)
    _check_integers(weight, scale, bits, x.shape[-1])
    _check.shape("weight", weight, -1, x.shape[-1])
    _check.shape("scale", scale, weight.shape[0])
    _check.shape("bias", bias, weight.shape[0])
    _check.same_device(x=x, weight=weight, scale=scale, bias=bias)
    x = autocast(x)
    rows = as_rows(x)
    backend = choose("linear_int8", x.device, rows, weight, scale, bias, bits)
    if wants_grad(x, scale, bias):
        y = record(_LinearInt8, rows, weight, scale, bias, bits, backend)
    else:
        y = _fwd(rows, weight, scale, bias, bits, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
