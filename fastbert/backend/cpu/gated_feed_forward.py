"""gated_feed_forward on the native GEMM with the gate in its epilogues, csrc/cpu/gated_feed_forward.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.cpu import (
    ACTIVATIONS,
    DTYPES,
    _gemm,
    address,
    fp32,
    fresh,
    native,
    unsupported_dtype,
)


def unsupported(
    x: Tensor,
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return (
        unsupported_dtype("x", x)
        or unsupported_dtype("w1[0]", w1[0])
        or unsupported_dtype("w2", w2)
    )


def forward(
    x: Tensor,  # (T, C)
    w1: Sequence[Tensor],  # [(2F, C)] or 2 of (F, C): the activated half, then the other
    b1: Sequence[Tensor],  # likewise, or empty
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (T, C) and the pre-activations u = [a, g] (T, 2F) in x's dtype, u empty without `save`."""
    (T, C), F = x.shape, w2.shape[1]
    u, h = fresh(x, T if save else 0, 2 * F), fresh(x, T, F)
    weights = [w.contiguous() for w in w1]
    wa, wg = weights if len(weights) == 2 else weights[0].split(F)
    bias = fp32(torch.cat(list(b1)) if len(b1) == 2 else b1[0]) if b1 else None
    native.gated_feed_forward_up(
        DTYPES[x.dtype],
        DTYPES[wa.dtype],
        ACTIVATIONS[activation],
        x.data_ptr(),
        wa.data_ptr(),
        wg.data_ptr(),
        0,
        address(bias),
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
    u: Tensor,  # (T, 2F)
    w1: Sequence[Tensor],
    w2: Tensor,
    activation: str,
    needs: Sequence[bool],  # for x, w1, b1, w2, b2
    dtype: torch.dtype,  # of dw1 and dw2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1 (2F, C), db1 (2F,), dw2, db2, empty where not needed; act(a) and its derivative from one evaluation."""
    (T, C), F = dy.shape, w2.shape[1]
    du, h = fresh(u, *u.shape), fresh(u, T, F)
    w2 = w2.contiguous()
    native.gated_feed_forward_down_bwd(
        DTYPES[dy.dtype],
        DTYPES[w2.dtype],
        ACTIVATIONS[activation],
        dy.data_ptr(),
        w2.data_ptr(),
        u.data_ptr(),
        du.data_ptr(),
        h.data_ptr() if needs[3] else 0,
        T,
        F,
        C,
        torch.get_num_threads(),
    )
    _, dw2, db2 = _gemm.gradients(dy, h, [w2], [False, *needs[3:]], dtype=dtype)
    return *_gemm.gradients(du, x, w1, needs[:3], dtype=dtype), dw2, db2
