"""x times the rows of one to three weights, and its gradients, on csrc/cpu/linear.cpp: shared by the ops with GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.cpu import DTYPES, address, fresh, native


def project(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x (T, K) times the weights' rows, one below the other, plus an fp32 bias (N,): (T, N) in x's dtype."""
    T, K = x.shape
    (w0, w1, w2), rows, N = stacked(weights)
    y = fresh(x, T, N)
    native.linear_fwd(
        DTYPES[x.dtype],
        DTYPES[w0.dtype],
        x.data_ptr(),
        w0.data_ptr(),
        w1.data_ptr(),
        w2.data_ptr(),
        rows,
        0,
        address(bias),
        y.data_ptr(),
        T,
        N,
        K,
        torch.get_num_threads(),
    )
    return y


def gradients(
    dy: Tensor,  # (T, N)
    x: Tensor,  # (T, K)
    weights: Sequence[Tensor],
    needs: Sequence[bool],  # for x, the weights, the biases
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight (N, K) of all weights together, in this dtype or theirs, and dbias (N,) fp32, all times alpha."""
    T, N = dy.shape
    K, weight, threads = x.shape[1], weights[0], torch.get_num_threads()
    kind = DTYPES[dy.dtype]
    dx, dweight, dbias = (dy.new_empty(0) for _ in range(3))
    if needs[0]:
        (w0, w1, w2), rows, _ = stacked(weights)
        dx = fresh(x, *x.shape)
        native.linear_bwd_dx(
            kind,
            DTYPES[weight.dtype],
            dy.data_ptr(),
            w0.data_ptr(),
            w1.data_ptr(),
            w2.data_ptr(),
            rows,
            alpha,
            dx.data_ptr(),
            T,
            N,
            K,
            threads,
        )
    if needs[1]:
        dweight = fresh(weight, N, K, dtype=dtype)
        native.linear_bwd_dw(
            kind,
            DTYPES[dweight.dtype],
            dy.data_ptr(),
            x.data_ptr(),
            alpha,
            dweight.data_ptr(),
            T,
            N,
            K,
            threads,
        )
    if needs[2]:
        dbias = dy.new_empty(N, dtype=torch.float32)
        native.linear_bwd_db(kind, dy.data_ptr(), alpha, dbias.data_ptr(), T, N, threads)
    return dx, dweight, dbias


def stacked(weights: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    """Three contiguous pieces (the last again where there are fewer), the rows of each, and of all."""
    given = [w.contiguous() for w in weights]
    first, second, third = given + given[-1:] * (3 - len(given))
    return (first, second, third), first.shape[0], first.shape[0] * len(given)
