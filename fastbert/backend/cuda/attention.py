"""attention on the CUDA kernels, csrc/cuda/attention.cu and _attention_bwd.cu: packed, exact, dropout replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cuda import (
    DTYPES,
    dropout_args,
    native,
    place,
    unsupported_dropout,
    unsupported_dtype,
)
from fastbert.backend.reference.attention_form import sizes


def unsupported(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,
    pairs: bool,
    bias: Tensor | None,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    if qkv.shape[-1] > 128:
        return f"the head size is {qkv.shape[-1]} and the cuda kernel goes up to 128: use the torch backend"
    return (
        _unsupported_form(qkv, left, right, kv_heads, rotary, bias)
        or unsupported_dtype(qkv=qkv)
        or unsupported_dropout(p)
    )


def _unsupported_form(
    qkv: Tensor,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,
    bias: Tensor | None,
) -> str | None:
    """Why the kernels, which know equal heads and `causal` only, do not take this call, or None."""
    elsewhere = "use the triton or the torch backend"
    if left >= 0 or right > 0:
        return f"the cuda attention has no window: {elsewhere}"
    if qkv.dim() == 3 and qkv.shape[1] != 3 * kv_heads:
        return f"the cuda attention takes as many key heads as query heads: {elsewhere}"
    if rotary is not None or bias is not None:
        name = "rotary positions" if bias is None else "bias"
        return f"the cuda attention has no {name}: {elsewhere}"
    return None


def forward(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,
    pairs: bool,
    bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in qkv's dtype and lse (H, T) fp32, empty without `save`; zeros past cu_seqlens[-1]."""
    T, (H, _, D) = qkv.shape[0], sizes(qkv, kv_heads)
    out = qkv.new_empty(T, H, D)
    lse = qkv.new_empty(H, T if save else 0, dtype=torch.float32)
    if T > 0:
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
            max_seqlen,
            scale,
            right == 0,
            *dropout_args(p, seed, site),
            *place(qkv),
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
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,
    pairs: bool,
    bias: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dqkv (T, 3, H, D), zeros past cu_seqlens[-1], and no gradient of a bias."""
    T, (H, _, D) = qkv.shape[0], sizes(qkv, kv_heads)
    dqkv, none = torch.empty_like(qkv), qkv.new_empty(0)
    if T > 0:
        delta = torch.empty_like(lse)
        native.attention_bwd(
            DTYPES[qkv.dtype],
            dout.data_ptr(),
            qkv.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            cu_seqlens.data_ptr(),
            delta.data_ptr(),
            dqkv.data_ptr(),
            T,
            cu_seqlens.shape[0] - 1,
            H,
            D,
            max_seqlen,
            scale,
            right == 0,
            *dropout_args(p, seed, site),
            *place(qkv),
        )
    return dqkv, none
