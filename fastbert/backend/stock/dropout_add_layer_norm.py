"""dropout_add_layer_norm by stock ops: the mask from Philox in torch integer arithmetic, then native_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.reference import philox
from fastbert.backend.reference.layer_norm import rebuilt
from fastbert.backend.stock import layer_norm


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def forward(
    x: Tensor,  # (N, C)
    residual: Tensor,  # (N, C)
    weight: Tensor,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    rows: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (N, C) in x's dtype; z = residual + dropout(x) likewise, empty without `save`; mean and rstd (N,) fp32."""
    z = residual + philox.dropout(x, p, seed, site, rows)
    y, mean, rstd = layer_norm.forward(z, weight, bias, eps)
    return y, z if save else x.new_empty(0, x.shape[1]), mean, rstd


def backward(
    dy: Tensor,  # (N, C)
    z: Tensor,  # (N, C), or y where bias is given
    weight: Tensor,  # (C,)
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    p: float,
    seed: Tensor | None,
    site: int,
    rows: Tensor | None,
    bias: Tensor | None = None,  # (C,)
    dz: Tensor | None = None,  # (N, C): the gradient that reaches z itself
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dresidual (N, C), dweight and dbias (C,)."""
    z = rebuilt(z, weight, bias, mean, rstd)
    dsum, dweight, dbias = layer_norm.backward(dy, z, weight, mean, rstd)
    if dz is not None:
        dsum = dsum + dz
    dx = torch.clone(dsum) if p == 0.0 else philox.dropout(dsum, p, seed, site, rows)
    return dx, dsum, dweight, dbias
