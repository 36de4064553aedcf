"""attention on the native CPU kernel, csrc/cpu/attention.cpp: packed, exact softmax, dropout replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cpu import (
    DTYPES,
    dropout_args,
    fresh,
    native,
    unsupported_dropout,
    unsupported_dtype,
)


def unsupported(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    causal: bool,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    if qkv.shape[3] > 128:
        return f"the head size is {qkv.shape[3]} and the cpu kernel goes up to 128: use the torch backend"
    return unsupported_dtype("qkv", qkv) or unsupported_dropout(p)


def forward(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    causal: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in qkv's dtype and lse (H, T) fp32, empty without `save`; zeros past cu_seqlens[-1]."""
    T, _, H, D = qkv.shape
    out = fresh(qkv, T, H, D)
    lse = qkv.new_empty(H, T if save else 0, dtype=torch.float32)
    native.attention_fwd(
        DTYPES[qkv.dtype],
        qkv.data_ptr(),
        cu_seqlens.data_ptr(),
        out.data_ptr(),
        lse.data_ptr() if save else 0,
        T,
        cu_seqlens.shape[0] - 1,
        H,
        D,
        scale,
        causal,
        *dropout_args(p, seed, site),
        torch.get_num_threads(),
    )
    return out, lse


def backward(
    dout: Tensor,  # (T, H, D)
    qkv: Tensor,  # (T, 3, H, D)
    out: Tensor,  # (T, H, D)
    lse: Tensor,  # (H, T)
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    causal: bool,
) -> Tensor:
    """dqkv (T, 3, H, D), zeros past cu_seqlens[-1]; the softmax runs again, lse is not read."""
    T, _, H, D = qkv.shape
    dqkv = fresh(qkv, *qkv.shape)
    native.attention_bwd(
        DTYPES[qkv.dtype],
        dout.data_ptr(),
        qkv.data_ptr(),
        out.data_ptr(),
        cu_seqlens.data_ptr(),
        dqkv.data_ptr(),
        T,
        cu_seqlens.shape[0] - 1,
        H,
        D,
        scale,
        causal,
        *dropout_args(p, seed, site),
        torch.get_num_threads(),
    )
    return dqkv
