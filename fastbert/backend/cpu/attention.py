"""attention on the native CPU kernel, csrc/cpu/attention.cpp: packed, exact softmax, dropout replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cpu import (
    DTYPES,
    address,
    dropout_args,
    fresh,
    native,
    unsupported_dropout,
    unsupported_dtype,
)
from fastbert.backend.reference.attention_form import sizes

# the largest head size; csrc/cpu/attend.h: kMostD
MOST_D = 256


def unsupported(
    qkv: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
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
    D = qkv.shape[-1]
    if D > MOST_D:
        return f"the head size is {D} and the cpu kernel goes up to {MOST_D}: use the torch backend"
    return unsupported_dtype("qkv", qkv) or unsupported_dropout(p)


def _form(
    qkv: Tensor,
    scale: float,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,
    pairs: bool,
    bias: Tensor | None,
) -> tuple[int, int, int, float, int, int, int, int, bool, int, int]:
    """The arguments H to `positions` of both kernels."""
    return (
        *sizes(qkv, kv_heads),
        scale,
        left,
        right,
        address(rotary),
        0 if rotary is None else rotary.shape[2],
        pairs,
        address(bias),
        0 if bias is None else (bias.shape[1] + 1) // 2,
    )


def forward(
    qkv: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,  # (P, 2, R / 2)
    pairs: bool,
    bias: Tensor | None,  # (H, 2 P - 1)
    save: bool,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in qkv's dtype and lse (H, T) fp32, empty without `save`; zeros past cu_seqlens[-1]."""
    T, (H, _, D) = qkv.shape[0], sizes(qkv, kv_heads)
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
        *_form(qkv, scale, left, right, kv_heads, rotary, pairs, bias),
        *dropout_args(p, seed, site),
        torch.get_num_threads(),
    )
    return out, lse


def backward(
    dout: Tensor,  # (T, H, D)
    qkv: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
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
    """dqkv like qkv, zeros past cu_seqlens[-1], and dbias (H, 2 P - 1), or empty; the softmax runs again."""
    T = qkv.shape[0]
    dqkv = fresh(qkv, *qkv.shape)
    dbias, parts = qkv.new_empty(0, dtype=torch.float32), None
    if needs_bias and bias is not None:
        dbias = torch.empty_like(bias)
        # every sequence's own sums, which the kernel adds up in order
        parts = dbias.new_zeros(bias.shape[0], 2 * T)
    native.attention_bwd(
        DTYPES[qkv.dtype],
        dout.data_ptr(),
        qkv.data_ptr(),
        out.data_ptr(),
        cu_seqlens.data_ptr(),
        dqkv.data_ptr(),
        0 if parts is None else dbias.data_ptr(),
        address(parts),
        T,
        cu_seqlens.shape[0] - 1,
        *_form(qkv, scale, left, right, kv_heads, rotary, pairs, bias),
        *dropout_args(p, seed, site),
        torch.get_num_threads(),
    )
    return dqkv, dbias
