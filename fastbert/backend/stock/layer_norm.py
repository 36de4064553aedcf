"""layer_norm by torch's native_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.reference.layer_norm import rebuilt


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    """Stock ops run every call."""
    return None


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias in the dtype that makes the stock kernel keep fp32 statistics for x.

    On the CPU a bf16 weight beside a bf16 x makes it return bf16 statistics, an fp32 weight fp32 ones (torch 2.13);
    on a GPU the weight must have x's dtype and the statistics are fp32 anyway.
    """
    if (
        weight is not None
        and bias is not None
        and weight.dtype == bias.dtype == torch.float32 == x.dtype
    ):
        return weight, bias
    if x.device.type != "cpu":
        return tuple(None if t is None else t.to(x.dtype) for t in (weight, bias))  # type: ignore[return-value]
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight is None:
        weight = x.new_ones(x.shape[-1], dtype=wide) if wide != x.dtype else None
    else:
        weight = weight.to(wide)
    if bias is None:
        bias = None if weight is None else torch.zeros_like(weight)
    return weight, bias.to(wide) if bias is not None else None


def forward(
    x: Tensor,  # (N, C)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, C) in x's dtype, mean and rstd (N,) fp32."""
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *_affine(x, weight, bias), eps)
    return y, mean.view(-1), rstd.view(-1)


def backward(
    dy: Tensor,  # (N, C)
    x: Tensor,  # (N, C), or y where bias is given
    weight: Tensor | None,  # (C,)
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    bias: Tensor | None = None,  # (C,)
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, C), dweight and dbias (C,), the last in fp32, which are empty where there is no weight."""
    x = rebuilt(x, weight, bias, mean, rstd)
    # the gradients do not depend on the bias; CUDA's kernel only reads its shape
    w, b = _affine(x, weight, weight)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy,
        x,
        x.shape[-1:],
        mean[:, None],
        rstd[:, None],
        w,
        b,
        [True, w is not None, w is not None],
    )
    if weight is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    return dx, dweight.to(weight.dtype), dbias.to(mean.dtype)
