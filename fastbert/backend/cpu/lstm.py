"""lstm on the native CPU kernel, csrc/cpu/lstm.cpp: no step waits for another thread, no padding is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.cpu import DTYPES, address, fp32, fresh, native, unsupported_dtype


def unsupported(
    gates: Tensor,  # (T, D 4 H)
    weights: Sequence[Tensor],  # D of (4H, H)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    h0: Tensor | None,  # (D, B, H)
    c0: Tensor | None,  # (D, B, H)
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("gates", gates) or unsupported_dtype("weights[0]", weights[0])


def _longest_first(cu_seqlens: Tensor) -> Tensor:
    """The sequences' numbers (B,) int32."""
    return cu_seqlens.diff().argsort(descending=True, stable=True).to(torch.int32)


def forward(
    gates: Tensor,  # (T, D 4 H)
    weights: Sequence[Tensor],  # D of (4H, H)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    h0: Tensor | None,  # (D, B, H)
    c0: Tensor | None,  # (D, B, H)
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D H) in gates' dtype, cells (T, D H) fp32; i, f, g, o (T, D 4 H) in gates' dtype, empty without `save`."""
    T, D, H = gates.shape[0], len(weights), weights[0].shape[1]
    y, cells = fresh(gates, T, D * H), fresh(gates, T, D * H, dtype=torch.float32)
    activated = fresh(gates, T if save else 0, D * 4 * H)
    order, h0, c0 = _longest_first(cu_seqlens), fp32(h0), fp32(c0)
    native.lstm_fwd(
        DTYPES[gates.dtype],
        DTYPES[weights[0].dtype],
        gates.data_ptr(),
        weights[0].data_ptr(),
        weights[-1].data_ptr(),
        cu_seqlens.data_ptr(),
        order.data_ptr(),
        address(h0),
        address(c0),
        y.data_ptr(),
        cells.data_ptr(),
        address(activated if save else None),
        T,
        cu_seqlens.shape[0] - 1,
        H,
        D,
        torch.get_num_threads(),
    )
    return y, cells, activated


def backward(
    dy: Tensor,  # (T, D H)
    activated: Tensor,  # (T, D 4 H)
    y: Tensor,  # (T, D H)
    cells: Tensor,  # (T, D H)
    weights: Sequence[Tensor],  # D of (4H, H)
    cu_seqlens: Tensor,
    max_seqlen: int,
    h0: Tensor | None,  # (D, B, H)
    c0: Tensor | None,  # (D, B, H)
    needs: Sequence[bool],  # for weights, h0, c0
    dcells: Tensor | None,  # (T, D H)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dgates (T, D 4 H), dweights (D 4 H, H), dh0 and dc0 (D, B, H) fp32; those that are not needed are empty."""
    T, D, H = dy.shape[0], len(weights), weights[0].shape[1]
    B = cu_seqlens.shape[0] - 1
    dgates = fresh(activated, *activated.shape)
    dweights = fresh(weights[0], *((D * 4 * H, H) if needs[0] else (0,)))
    dh0, dc0 = (
        cells.new_empty((D, B, H) if need else 0, dtype=torch.float32) for need in needs[1:]
    )
    order, h0, c0, dcells = _longest_first(cu_seqlens), fp32(h0), fp32(c0), fp32(dcells)
    native.lstm_bwd(
        DTYPES[dy.dtype],
        DTYPES[weights[0].dtype],
        dy.data_ptr(),
        address(dcells),
        activated.data_ptr(),
        y.data_ptr(),
        cells.data_ptr(),
        weights[0].data_ptr(),
        weights[-1].data_ptr(),
        cu_seqlens.data_ptr(),
        order.data_ptr(),
        address(h0),
        address(c0),
        dgates.data_ptr(),
        address(dweights if needs[0] else None),
        address(dh0 if needs[1] else None),
        address(dc0 if needs[2] else None),
        T,
        B,
        H,
        D,
        torch.get_num_threads(),
    )
    return dgates, dweights, dh0, dc0
