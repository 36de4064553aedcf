"""feed_forward on the native GEMM with GELU in its epilogues, csrc/cpu/feed_forward.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.cpu import (
    DTYPES,
    GELUS,
    _gemm,
    address,
    fp32,
    fresh,
    native,
    unsupported_dtype,
)


def unsupported(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("x", x) or unsupported_dtype("w1", w1) or unsupported_dtype("w2", w2)


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
    T, C = x.shape
    F = w1.shape[0]
    u, h = fresh(x, T if save else 0, F), fresh(x, T, F)
    w1, b1 = w1.contiguous(), fp32(b1)
    native.feed_forward_up(
        DTYPES[x.dtype],
        DTYPES[w1.dtype],
        GELUS[approximate],
        x.data_ptr(),
        w1.data_ptr(),
        0,
        address(b1),
        u.data_ptr() if save else 0,
        h.data_ptr(),
        T,
        F,
        C,
        torch.get_num_threads(),
    )
    return _gemm.project(h, [w2], fp32(b2)), u


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
    """dx, dw1, db1, dw2, db2, empty where not needed; gelu(u) and its derivative come from one evaluation."""
    T, F = u.shape
    du, h = fresh(u, *u.shape), fresh(u, *u.shape)
    w2 = w2.contiguous()
    native.feed_forward_down_bwd(
        DTYPES[dy.dtype],
        DTYPES[w2.dtype],
        GELUS[approximate],
        dy.data_ptr(),
        w2.data_ptr(),
        u.data_ptr(),
        du.data_ptr(),
        h.data_ptr() if needs[3] else 0,
        T,
        F,
        dy.shape[1],
        torch.get_num_threads(),
    )
    _, dw2, db2 = _gemm.gradients(dy, h, [w2], [False, *needs[3:]])
    return *_gemm.gradients(du, x, [w1], needs[:3]), dw2, db2
