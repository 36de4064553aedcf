"""attention by stock ops on padded sequences: SDPA where nothing is saved or dropped, else matmul and softmax.

SDPA neither takes a dropout mask nor returns the log-sum-exp, so training goes the explicit way; its backward runs
softmax again, one fused pass, and needs neither out nor lse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.reference import philox
from fastbert.backend.stock._layout import Layout


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def _dropped(t: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """t (B, H, S, S) with dropout's factor applied; the counters do not depend on the padding."""
    if p == 0.0 or seed is None:
        return t
    B, H, S, _ = t.shape
    bh = torch.arange(B * H, device=t.device).view(B, H)
    keep = philox.attention_keep_mask(seed, site, bh, S, S, p)
    return torch.where(keep, t * (1.0 / (1.0 - p)), 0.0)


def padded(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B + 1,) int32, or (B, S) bool
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    causal: bool = False,
    seed: Tensor | None = None,
    site: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """functional.attention by torch's sdpa, where no size depends on values; dropout has torch's own bits.

    For exporters, and for batches whose outputs at padding are wanted. In place of cu_seqlens it takes the mask (B, S),
    True at tokens, of a batch whose T = B S rows keep the padding: every row attends to its sequence's tokens.
    """
    layout = None if cu_seqlens.dim() == 2 else Layout(cu_seqlens, qkv.shape[0], max_seqlen)
    if layout is None:
        heads = qkv.unflatten(0, cu_seqlens.shape).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind()  # each (B, H, S, D)
        token = cu_seqlens
    else:
        q, k, v = layout.pad(qkv).unbind(2)
        token = layout.valid
    seen = token[:, None, None, :]
    if causal:
        length = token.shape[1]
        seen = seen & torch.ones(length, length, dtype=torch.bool, device=token.device).tril()
    # a query without any key sees all: no weights at all are NaN, which the next layer would spread
    seen = seen | ~seen.any(-1, keepdim=True)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, p, scale=scale)
    if layout is None:
        return y.transpose(1, 2).flatten(0, 1)
    if not return_lse:
        return layout.unpad(y)
    lse = layout.scores(q, k, q.shape[-1] ** -0.5 if scale is None else scale, causal).logsumexp(-1)
    return layout.unpad(y), layout.unpad(lse).t().contiguous()


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
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if T == 0 or max_seqlen == 0 or cu_seqlens.shape[0] == 1:
        lse = qkv.new_zeros(H, T if save else 0, dtype=wide)
        return qkv.new_zeros(T, H, D), lse
    layout = Layout(cu_seqlens, T, max_seqlen)
    q, k, v = layout.pad(qkv).unbind(2)  # each (B, H, S, D)
    if not save and p == 0.0:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        seen = layout.valid[:, None, None, :]
        if causal:
            seen = seen & torch.ones_like(layout.valid[0]).expand(layout.S, -1).tril()
        return layout.unpad(sdpa(q, k, v, seen, scale=scale)), qkv.new_empty(H, 0, dtype=wide)
    scores = layout.scores(q, k, scale, causal)
    P = scores.softmax(-1, dtype=wide)
    out = layout.unpad(_dropped(P, p, seed, site).to(v.dtype) @ v)
    if not save:
        return out, qkv.new_empty(H, 0, dtype=wide)
    # the largest weight is exp(largest score - lse)
    lse = scores.amax(-1).to(wide) - P.amax(-1).log()
    return out, layout.unpad(lse).t().contiguous()


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
    """dqkv (T, 3, H, D), zeros past cu_seqlens[-1]."""
    T = qkv.shape[0]
    if T == 0 or max_seqlen == 0 or cu_seqlens.shape[0] == 1:
        return torch.zeros_like(qkv)
    layout = Layout(cu_seqlens, T, max_seqlen)
    q, k, v = layout.pad(qkv).unbind(2)
    # a padding query repeats a real row: its gradient must not count
    do = layout.pad(dout).masked_fill(~layout.valid[:, None, :, None], 0.0)
    P = layout.scores(q, k, scale, causal).softmax(-1)
    dv = _dropped(P, p, seed, site).mT @ do
    dP = _dropped(do @ v.mT, p, seed, site)
    dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
    grads = (scale * (dS @ k), scale * (dS.mT @ q), dv)
    return torch.stack([layout.unpad(t) for t in grads], 1)
