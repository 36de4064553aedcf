"""attention: flash-style attention inside packed sequences, dropout replayed, nothing of size S x S kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.stock.attention import padded
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import once_differentiable, record, register, wants_grad
from fastbert.ops.context import autocast, exported_as, seed_for


def _fwd_check(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *_: Any) -> None:
    _check.cu_seqlens_valid(cu_seqlens, qkv.shape[0], max_seqlen)


def _fwd_fake(qkv: Tensor, *rest: Any) -> Any:
    T, _, H, D = qkv.shape
    save = rest[-2]
    stat = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(T, H, D), qkv.new_empty(H, T if save else 0, dtype=stat)


def _bwd_fake(dout: Tensor, qkv: Tensor, *rest: Any) -> Any:
    return torch.empty_like(qkv)


_fwd = register(
    "attention",
    "forward",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, float p, Tensor? seed, int site, bool causal, "
    "bool save) -> (Tensor, Tensor)",
    _fwd_fake,
    _fwd_check,
    tuned_by=TunedBy(dtype="qkv", sizes="qkv", rows="qkv", of_row=True),
)
_bwd = register(
    "attention",
    "backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale, float p, "
    "Tensor? seed, int site, bool causal) -> Tensor",
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
        causal: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _fwd(qkv, cu_seqlens, max_seqlen, scale, p, seed, site, causal, True, backend)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, seed)
        ctx.scalars = (max_seqlen, scale, p, site, causal, backend)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Any) -> Any:
        qkv, out, lse, cu_seqlens, seed = ctx.saved_tensors
        max_seqlen, scale, p, site, causal, backend = ctx.scalars
        dout = dout.contiguous()
        args = (cu_seqlens, max_seqlen, scale, p, seed, site, causal, backend)
        return _bwd(dout, qkv, out, lse, *args), *[None] * 8


@exported_as(padded)
def attention(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    causal: bool = False,
    seed: Tensor | None = None,  # (1,) int64
    site: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale Q K^T) V inside each packed sequence -> out (T, H, D), with return_lse also lse (H, T) fp32.

    Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; rows past cu_seqlens[-1] are not read and come out zero.
    scale defaults to D**-0.5; p drops attention weights, replayed in backward from the seed. `causal` hides later
    tokens. Saves qkv, out, lse. lse carries no gradient. Refuses shapes that don't fit, p outside [0, 1), and on the
    CPU cu_seqlens that fall or run past T. Vaswani et al. 2017; Dao et al. 2022 (flash attention).
    """
    _check.floating(qkv=qkv)
    if qkv.dim() != 4 or qkv.shape[1] != 3 or 0 in qkv.shape[2:]:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, expected (T, 3, H, D): use qkv_proj, or stack q, k, v on dim 1"
        )
    _check.sequences(cu_seqlens, max_seqlen)
    _check.dropout(p, site)
    _check.same_device(qkv=qkv, cu_seqlens=cu_seqlens)
    qkv, cu_seqlens = autocast(qkv).contiguous(), cu_seqlens.contiguous()
    scale = qkv.shape[3] ** -0.5 if scale is None else float(scale)
    seed = seed_for(p, seed, qkv)
    save = wants_grad(qkv)
    args = (qkv, cu_seqlens, max_seqlen, scale, p, seed, site, causal)
    backend = choose("attention", qkv.device, *args, save or return_lse)
    out, lse = record(_Attention, *args, backend) if save else _fwd(*args, return_lse, backend)
    return (out, lse) if return_lse else out
