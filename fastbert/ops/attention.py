"""attention: flash-style attention inside packed sequences, dropout replayed, nothing of size S x S kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.attention_form import Rotary, bounds, sizes
from fastbert.backend.stock.attention import padded
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import (
    none_if_empty,
    once_differentiable,
    record,
    register,
    sums,
    wants_grad,
)
from fastbert.ops.context import autocast, exported_as, seed_for


def _fwd_check(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *_: Any) -> None:
    _check.cu_seqlens_valid(cu_seqlens, qkv.shape[0], max_seqlen)


def _fwd_fake(qkv: Tensor, *rest: Any) -> Any:
    kv_heads, save = rest[-6], rest[-2]
    H, _, D = sizes(qkv, kv_heads)
    lse = qkv.new_empty(H, qkv.shape[0] if save else 0, dtype=sums(qkv))
    return qkv.new_empty(qkv.shape[0], H, D), lse


def _bwd_fake(dout: Tensor, qkv: Tensor, *rest: Any) -> Any:
    bias, needs_bias = rest[-3], rest[-2]
    return torch.empty_like(qkv), torch.empty_like(bias) if needs_bias else dout.new_empty(0)


_FORM = "int left, int right, int kv_heads, Tensor? rotary, bool pairs, Tensor? bias"
_fwd = register(
    "attention",
    "forward",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, float p, Tensor? seed, int site, "
    f"{_FORM}, bool save) -> (Tensor, Tensor)",
    _fwd_fake,
    _fwd_check,
    tuned_by=TunedBy(dtype="qkv", sizes="qkv", rows="qkv", of_row=True),
)
_bwd = register(
    "attention",
    "backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale, float p, "
    f"Tensor? seed, int site, {_FORM}, bool needs_bias) -> (Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="qkv", sizes="qkv", rows="dout", of_row=True),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
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
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        drop, window = (scale, p, seed, site), (left, right, kv_heads)
        args = (qkv, cu_seqlens, max_seqlen, *drop, *window, rotary, pairs, bias)
        out, lse = _fwd(*args, True, backend)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, seed, rotary, bias)
        ctx.scalars = (max_seqlen, scale, p, site, window, pairs, backend)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Any) -> Any:
        qkv, out, lse, cu_seqlens, seed, rotary, bias = ctx.saved_tensors
        max_seqlen, scale, p, site, window, pairs, backend = ctx.scalars
        of_bias = ctx.needs_input_grad[12]
        drop = (scale, p, seed, site)
        args = (cu_seqlens, max_seqlen, *drop, *window, rotary, pairs, bias, of_bias, backend)
        dqkv, dbias = _bwd(dout.contiguous(), qkv, out, lse, *args)
        return dqkv, *[None] * 11, none_if_empty(dbias), None


@exported_as(padded)
def attention(
    qkv: Tensor,  # (T, 3, H, D), or (T, H + 2 kv_heads, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    kv_heads: int | None = None,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,  # (H, 2 P - 1), P >= max_seqlen
    seed: Tensor | None = None,  # (1,) int64
    site: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale Q K^T + bias) V inside each packed sequence -> out (T, H, D), with return_lse also lse (H, T) fp32.

    Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; rows past cu_seqlens[-1] are not read and come out zero.
    scale defaults to D**-0.5; p drops attention weights, replayed in backward from the seed. `causal` hides later
    tokens; `window` = (left, right) hides those more than `left` before and more than `right` behind a query, -1 none
    on that side: time and memory grow with T times the window. With `kv_heads` qkv holds H queries, then as many keys,
    then values, per token; query head h reads key h kv_heads // H. `rotary` turns q and k by their positions in the
    sequence (functional.Rotary). `bias` adds bias[h, j - i + P - 1] to the score of query i and key j
    (functional.relative_bias). Saves qkv, out, lse. lse carries no gradient. Refuses shapes that don't fit, p outside
    [0, 1), a window of no other token, and on the CPU cu_seqlens that fall or run past T. Vaswani et al. 2017; Dao et
    al. 2022 (flash attention); Beltagy et al. 2020 (window); Ainslie et al. 2023 (kv_heads); Raffel et al. 2020 (bias).
    """
    _check.floating(qkv=qkv, bias=bias)
    kv_heads = _kv_heads(qkv, kv_heads)
    left, right = _window(window, causal)
    _check.sequences(cu_seqlens, max_seqlen)
    _check.dropout(p, site)
    H, _, D = sizes(qkv, kv_heads)
    table, pairs = _rotary(rotary, D, max_seqlen)
    if bias is not None:
        _check.shape("bias", bias, H, -1)
        if bias.shape[1] % 2 == 0 or bias.shape[1] < 2 * max_seqlen - 1:
            raise ValueError(
                f"bias has {bias.shape[1]} columns: pass an odd number, at least 2 * max_seqlen - 1 = "
                f"{2 * max_seqlen - 1}"
            )
    _check.same_device(qkv=qkv, cu_seqlens=cu_seqlens, bias=bias, rotary=table)
    qkv, cu_seqlens = autocast(qkv).contiguous(), cu_seqlens.contiguous()
    if bias is not None:
        bias = bias.to(sums(qkv)).contiguous()
    scale = D**-0.5 if scale is None else float(scale)
    seed = seed_for(p, seed, qkv)
    save = wants_grad(qkv, bias)
    drop, form = (scale, p, seed, site), (left, right, kv_heads, table, pairs, bias)
    args = (qkv, cu_seqlens, max_seqlen, *drop, *form)
    backend = choose("attention", qkv.device, *args, save or return_lse)
    out, lse = record(_Attention, *args, backend) if save else _fwd(*args, return_lse, backend)
    return (out, lse) if return_lse else out


def _kv_heads(qkv: Tensor, kv_heads: int | None) -> int:
    """The number of key heads; refuses a qkv that is not (T, 3, H, D), or (T, H + 2 kv_heads, D) with H a multiple."""
    if kv_heads is None:
        if qkv.dim() != 4 or qkv.shape[1] != 3 or 0 in qkv.shape[2:]:
            raise ValueError(
                f"qkv has shape {tuple(qkv.shape)}, expected (T, 3, H, D): use qkv_proj, or stack q, k, v on dim 1"
            )
        return qkv.shape[2]
    heads = qkv.shape[1] - 2 * kv_heads if qkv.dim() == 3 else 0
    if kv_heads < 1 or heads < kv_heads or heads % kv_heads or qkv.shape[2] == 0:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, expected (T, H + 2 * {kv_heads}, D) with H a multiple of "
            f"kv_heads={kv_heads}"
        )
    return kv_heads


def _window(window: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    """The window's bounds with `causal` counted in; refuses one in which a token sees no other."""
    left, right = bounds(window, causal)
    if left < -1 or right < -1 or (left == 0 and right == 0):
        raise ValueError(
            f"window is {window}{' and causal' if causal else ''}: pass the numbers of tokens to see before and "
            "behind, one of them above 0, or -1 for all"
        )
    return left, right


def _rotary(rotary: Rotary | None, D: int, max_seqlen: int) -> tuple[Tensor | None, bool]:
    """The table (P, 2, R / 2) fp32 and its layout; refuses a table that does not fit the heads or the sequences."""
    if rotary is None:
        return None, False
    table = rotary.table
    if table.dim() != 3 or table.shape[1] != 2 or table.dtype != torch.float32:
        raise ValueError(
            f"rotary.table is {table.dtype} of shape {tuple(table.shape)}: pass float32 (P, 2, R / 2), such as "
            "Rotary.of makes"
        )
    if 2 * table.shape[2] > D:
        raise ValueError(
            f"rotary.table turns {2 * table.shape[2]} elements of a head, which has {D}"
        )
    if table.shape[0] < max_seqlen:
        raise ValueError(
            f"rotary.table has {table.shape[0]} positions: make it for max_seqlen={max_seqlen}"
        )
    return table.contiguous(), rotary.pairs
