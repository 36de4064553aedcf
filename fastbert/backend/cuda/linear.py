"""linear: the library's GEMMs, and the bias' gradient by csrc/cuda/linear.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.cuda import DTYPES, column_partials, native, place, unsupported_dtype
from fastbert.backend.stock import linear as library


def unsupported(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(x=x, weight=weight, bias=bias)


def forward(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
) -> Tensor:
    """y (T, N) in x's dtype."""
    return library.forward(x, weight, bias)


def backward(
    dy: Tensor,  # (T, N), its rows may lie apart
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    needs: Sequence[bool],  # for x, weight, bias
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, K), dweight (N, K), dbias (N,) fp32; empty where not needed."""
    dx, dweight, dbias = library.backward(dy, x, weight, [*needs[:2], False], dtype)
    return dx, dweight, row_sum(dy) if needs[2] else dbias


def row_sum(
    dy: Tensor,  # (T, N), its rows may lie apart
) -> Tensor:
    """The sum over the rows, (N,) fp32."""
    T, N = dy.shape
    if dy.numel() == 0:
        return dy.new_zeros(N, dtype=torch.float32)
    db, partial = dy.new_empty(N, dtype=torch.float32), column_partials(dy)
    native.linear_bwd_db(
        DTYPES[dy.dtype],
        dy.data_ptr(),
        dy.stride(0),
        partial.data_ptr(),
        db.data_ptr(),
        partial.shape[0],
        T,
        N,
        *place(dy),
    )
    return db
