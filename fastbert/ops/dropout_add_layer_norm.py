"""dropout_add_layer_norm: LayerNorm(residual + dropout(x)), and on demand the sum too, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.dropout_add_layer_norm import eager
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import (
    as_rows,
    as_shape,
    once_differentiable,
    record,
    register,
    sums,
    wants_grad,
)
from fastbert.ops.context import exported_as, seed_for
from fastbert.ops.layer_norm import row_stats


def _fwd_fake(x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> Any:
    save = rest[-2]
    z = torch.empty_like(x) if save else x.new_empty(0, x.shape[1])
    return torch.empty_like(x), z, *row_stats(x)


def _bwd_fake(dy: Tensor, z: Tensor, weight: Tensor, *rest: Any) -> Any:
    return (
        torch.empty_like(z),
        torch.empty_like(z),
        torch.empty_like(weight),
        torch.empty_like(weight, dtype=sums(z)),
    )


_fwd = register(
    "dropout_add_layer_norm",
    "forward",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, float p, Tensor? seed, int site, "
    "Tensor? rows, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="weight", rows="x"),
)
_bwd = register(
    "dropout_add_layer_norm",
    "backward",
    "(Tensor dy, Tensor z, Tensor weight, Tensor mean, Tensor rstd, float p, Tensor? seed, int site, "
    "Tensor? rows, Tensor? bias, Tensor? dz) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="dy", sizes="weight", rows="dy"),
)


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        p: float,
        seed: Tensor | None,
        site: int,
        rows: Tensor | None,
        from_output: bool,
        return_sum: bool,
        backend: str,
    ) -> Any:
        args = (x, residual, weight, bias, eps, p, seed, site, rows)
        y, z, mean, rstd = _fwd(*args, not from_output, backend)
        kept, shift = (y, bias) if from_output else (z, None)
        ctx.save_for_backward(kept, weight, mean, rstd, seed, rows, shift)
        ctx.p, ctx.site, ctx.backend = p, site, backend
        ctx.has_bias = bias is not None
        # an output that the loss does not use has the gradient None, not zeros
        ctx.set_materialize_grads(False)
        return (y, z) if return_sum else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None) -> Any:
        kept, weight, mean, rstd, seed, rows, shift = ctx.saved_tensors
        dy = torch.zeros_like(kept) if dy is None else dy.contiguous()
        dz = None if dz is None else dz.contiguous()
        drop = (ctx.p, seed, ctx.site, rows)
        *grads, dbias = _bwd(dy, kept, weight, mean, rstd, *drop, shift, dz, ctx.backend)
        return *grads, dbias if ctx.has_bias else None, *[None] * 8


@exported_as(eager)
def dropout_add_layer_norm(
    x: Tensor,  # (..., C)
    residual: Tensor,  # (..., C)
    weight: Tensor,  # (C,)
    bias: Tensor | None = None,  # (C,)
    *,
    eps: float = 1e-12,
    p: float = 0.0,
    seed: Tensor | None = None,  # (1,) int64
    site: int = 0,
    rows: Tensor | None = None,  # (N,) int64
    from_output: bool = False,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)) over the last dimension, in x's dtype, under autocast too.

    `rows` are the absolute row numbers that dropout counts by, where x holds compacted rows; 0..N-1 without it. A
    residual of another dtype is cast to x's. Saves z = residual + dropout(x) and two statistics a row for backward, no
    mask. With `from_output` it saves the output instead, which the next layer keeps anyway, and rebuilds the normalised
    rows as (y - bias) / weight: less memory, but y is rounded: where |bias| is far above |weight|, gradients of 16-bit
    rows are less exact (a ratio of 10: 5 times the error), and where |weight| is nearly 0 they are wrong.
    `return_sum` returns (y, z), as pre-norm layers need; backward adds the gradient of z in the same pass. Refuses p
    outside [0, 1), unequal shapes, integer tensors, `from_output` with `return_sum` or without a bias. Devlin et al.
    2018, section A.2; Xiong et al. 2020.
    """
    _check.given(residual=residual, weight=weight)
    _check.floating(x=x, residual=residual, weight=weight, bias=bias)
    _check.has_rows(x)
    _check.epsilon(eps)
    C = x.shape[-1]
    _check.shape("residual", residual, *x.shape)
    _check.shape("weight", weight, C)
    _check.shape("bias", bias, C)
    _check.dropout(p, site)
    if from_output and bias is None:
        raise ValueError("from_output is set without bias: pass a bias of zeros")
    if from_output and return_sum:
        raise ValueError(
            "from_output and return_sum are both set: the sum is kept by the caller anyway, leave from_output out"
        )
    _check.integer(rows=rows)
    _check.same_device(x=x, residual=residual, weight=weight, bias=bias, rows=rows)
    flat = as_rows(x)
    _check.shape("rows", rows, flat.shape[0])
    res = as_rows(residual if residual.dtype == x.dtype else residual.to(x.dtype))
    seed = seed_for(p, seed, x)
    save = wants_grad(x, residual, weight, bias)
    args = (flat, res, weight, bias, eps, p, seed, site, rows)
    backend = choose("dropout_add_layer_norm", x.device, *args, save or return_sum)
    if save:
        y = record(_DropoutAddLayerNorm, *args, from_output, return_sum, backend)
    else:
        y, z, *_ = _fwd(*args, return_sum, backend)
        y = (y, z) if return_sum else y
    if return_sum:
        return as_shape(y[0], x.shape), as_shape(y[1], x.shape)
    return as_shape(y, x.shape)
