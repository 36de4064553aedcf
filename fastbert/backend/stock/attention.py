"""attention by stock ops on padded sequences: SDPA where nothing is saved or dropped, else matmul and softmax.

SDPA neither takes a dropout mask nor returns the log-sum-exp, so training goes the explicit way; its backward runs
softmax again, one fused pass, and needs neither out nor lse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.reference import philox
from fastbert.backend.reference.attention_form import (
    Rotary,
    biases,
    bounds,
    diagonal_sums,
    hidden_keys,
    rotate,
    sizes,
    split,
)
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


class _Heads:
    """The heads of qkv, padded (B, heads, S, D), and what the scores of every sequence get."""

    def __init__(
        self,
        padded: tuple[Tensor, Tensor, Tensor],  # q (B, H, S, D), k and v (B, kv_heads, S, D)
        left: int,
        right: int,
        rotary: Tensor | None,
        pairs: bool,
        bias: Tensor | None,
    ) -> None:
        q, k, v = padded
        S, self.group = q.shape[2], q.shape[1] // k.shape[1]
        if rotary is not None:
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k = (rotate(t.to(wide), rotary, pairs).to(t.dtype) for t in (q, k))
        self.q = q
        if self.group > 1:
            k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))
        self.k, self.v = k, v
        places = torch.arange(S, device=q.device)
        self.hidden = hidden_keys(places, places, left, right)  # (S, S) bool, or None
        self.bias = None if bias is None else biases(bias, S)  # (H, S, S)

    def mask(self, seen: Tensor) -> Tensor:
        """sdpa's mask of keys (B, 1, 1 or S, S) that may be seen: of bool, or with biases added to the scores."""
        if self.hidden is not None:
            seen = seen & ~self.hidden
        if self.bias is None:
            return seen
        return self.bias.to(self.q.dtype).masked_fill(~seen, -torch.inf)

    def joined(
        self, dq: Tensor, dk: Tensor, dv: Tensor, rotary: Tensor | None, pairs: bool
    ) -> Tensor:
        """The gradients (B, H, S, D) of q, k and v as one of the heads before all that: (B, H + 2 kv_heads, S, D)."""
        if self.group > 1:
            dk, dv = (t.unflatten(1, (-1, self.group)).sum(2) for t in (dk, dv))
        if rotary is not None:
            dq, dk = (rotate(t, rotary, pairs, back=True) for t in (dq, dk))
        return torch.cat([dq, dk, dv], 1)


def padded(
    qkv: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
    cu_seqlens: Tensor,  # (B + 1,) int32, or (B, S) bool
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    kv_heads: int | None = None,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    site: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """functional.attention by torch's sdpa, where no size depends on values; dropout has torch's own bits.

    For exporters, and for batches whose outputs at padding are wanted. In place of cu_seqlens it takes the mask (B, S),
    True at tokens, of a batch whose T = B S rows keep the padding: every row attends to its sequence's tokens.
    """
    layout = None if cu_seqlens.dim() == 2 else Layout(cu_seqlens, qkv.shape[0], max_seqlen)
    parts = split(qkv, qkv.shape[2] if kv_heads is None else kv_heads)
    if layout is None:
        q, k, v = (t.unflatten(0, cu_seqlens.shape).transpose(1, 2) for t in parts)
        token = cu_seqlens
    else:
        q, k, v = map(layout.pad, parts)
        token = layout.valid
    table, pairs = (None, False) if rotary is None else (rotary.table, rotary.pairs)
    heads = _Heads((q, k, v), *bounds(window, causal), table, pairs, bias)
    seen = token[:, None, None, :]
    if heads.hidden is not None:
        seen = seen & ~heads.hidden
    # a query without any key sees all: no weights at all are NaN, which the next layer would spread
    seen = seen | ~seen.any(-1, keepdim=True)
    mask = seen if heads.bias is None else heads.mask(seen)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    y = sdpa(heads.q, heads.k, heads.v, mask, p, scale=scale)
    if layout is None:
        return y.transpose(1, 2).flatten(0, 1)
    if not return_lse:
        return layout.unpad(y)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lse = layout.scores(heads.q, heads.k, scale, heads.hidden, heads.bias).logsumexp(-1)
    return layout.unpad(y), layout.unpad(lse).t().contiguous()


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
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if T == 0 or max_seqlen == 0 or cu_seqlens.shape[0] == 1:
        lse = qkv.new_zeros(H, T if save else 0, dtype=wide)
        return qkv.new_zeros(T, H, D), lse
    layout = Layout(cu_seqlens, T, max_seqlen)
    q, k, v = map(layout.pad, split(qkv, kv_heads))
    heads = _Heads((q, k, v), left, right, rotary, pairs, bias)
    if not save and p == 0.0:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        mask = heads.mask(layout.valid[:, None, None, :])
        y = sdpa(heads.q, heads.k, heads.v, mask, scale=scale)
        return layout.unpad(y), qkv.new_empty(H, 0, dtype=wide)
    scores = layout.scores(heads.q, heads.k, scale, heads.hidden, heads.bias)
    P = scores.softmax(-1, dtype=wide)
    out = layout.unpad(_dropped(P, p, seed, site).to(v.dtype) @ heads.v)
    if not save:
        return out, qkv.new_empty(H, 0, dtype=wide)
    # the largest weight is exp(largest score - lse)
    lse = scores.amax(-1).to(wide) - P.amax(-1).log()
    return out, layout.unpad(lse).t().contiguous()


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
    """dqkv like qkv, zeros past cu_seqlens[-1], and dbias (H, 2 P - 1), or empty."""
    T = qkv.shape[0]
    dbias = qkv.new_zeros(0) if bias is None or not needs_bias else torch.zeros_like(bias)
    if T == 0 or max_seqlen == 0 or cu_seqlens.shape[0] == 1:
        return torch.zeros_like(qkv), dbias
    layout = Layout(cu_seqlens, T, max_seqlen)
    q, k, v = map(layout.pad, split(qkv, kv_heads))
    heads = _Heads((q, k, v), left, right, rotary, pairs, bias)
    # a padding query repeats a real row: its gradient must not count
    do = layout.pad(dout).masked_fill(~layout.valid[:, None, :, None], 0.0)
    P = layout.scores(heads.q, heads.k, scale, heads.hidden, heads.bias).softmax(-1)
    dv = _dropped(P, p, seed, site).mT @ do
    dP = _dropped(do @ heads.v.mT, p, seed, site)
    dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
    grads = (scale * (dS @ heads.k), scale * (dS.mT @ heads.q), dv)
    if dbias.numel():
        dS = dS.to(dbias.dtype).masked_fill(~layout.valid[:, None, :, None], 0.0)
        dbias = diagonal_sums(dS.sum(0), dbias.shape[1])
    return layout.unpad(heads.joined(*grads, rotary, pairs)).view_as(qkv), dbias
