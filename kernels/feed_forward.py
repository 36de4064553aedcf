"""feed_forward: the library's GEMMs around Triton's bias_gelu, whose backward rebuilds gelu and sums db1 in one pass.

Up to FEW tokens the first GEMM is ours, with bias and gelu in its epilogue: a launch costs more than the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend import _gpu_feed_forward
from fastbert.backend._common import unsupported_gelu
from fastbert.backend.stock import linear as library
from fastbert.kernels import _gemm, bias_gelu, linear, unsupported_dtype
from fastbert.kernels.linear import FEW


def unsupported(
    x: Tensor,  # (T, C)
    w1: Tensor,  # (F, C)
    b1: Tensor | None,  # (F,)
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    approximate: str,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_gelu(approximate) or unsupported_dtype(x=x, w1=w1, w2=w2)


def forward(
    x: Tensor,  # (T, C)
    w1: Tensor,  # (F, C)
    b1: Tensor | None,  # (F,)
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    approximate: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (T, C) and the pre-activation u (T, F) in x's dtype, u empty without `save`."""
    if x.shape[0] <= FEW:
        biases = [] if b1 is None else [b1]
        u, h = _gemm.project(x, [w1], biases, approximate, product=save)
    else:
        u = library.forward(x, w1, b1)
        h = bias_gelu.forward(u, None, approximate)
    return library.forward(h, w2, b2), u if save else x.new_empty(0, w1.shape[0])


def backward(
    dy: Tensor,  # (T, C)
    x: Tensor,  # (T, C)
    u: Tensor,  # (T, F)
    w1: Tensor,
    w2: Tensor,
    approximate: str,
    needs: Sequence[bool],  # for x, w1, b1, w2, b2
    dtype: torch.dtype,  # of dw1 and dw2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, db1, dw2, db2, empty where not needed; gelu(u) is built again from u."""
    args = (dy, x, u, w1, w2, approximate, needs, dtype)
    return _gpu_feed_forward.backward(linear.backward, bias_gelu.gradients, *args)
