"""Attention weights as tensors, which the kernels never make: slow and large, for looking at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.backend.reference.attention_form import Rotary, bounds, hidden_keys, rotate, split
from fastbert.nn.layer import LayerCall, LayerSettings
from fastbert.nn.packing import Packing


def attention_maps(
    qkv: Tensor,  # (T, 3, H, D)
    packing: Packing,
    window: tuple[int, int] | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """The softmax weights (B, H, S, S) before dropout, in the dtype of qkv, with zeros at padding.

    As in the op `attention`, a token's position is the number of tokens before it in its sequence.
    """
    token = packing.spread(qkv.new_ones(qkv.shape[0], dtype=torch.bool))  # (B, S)
    offset = (token.cumsum(1) - 1).clamp(min=0)  # (B, S)
    q, k, _ = packing.spread(qkv).permute(2, 0, 3, 1, 4)  # each (B, H, S, D)
    if rotary is not None:
        both = torch.stack([q, k]).transpose(1, 2).flatten(2, 3)  # (2, H, B S, D)
        turned = rotate(both, rotary.table[offset.flatten()], rotary.pairs)
        q, k = turned.unflatten(2, token.shape).transpose(1, 2)
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    seen = token[:, None, None, :].expand_as(scores)
    if window is not None:
        hidden = [hidden_keys(row, row, *bounds(window, False)) for row in offset]
        seen = seen & ~torch.stack([h for h in hidden if h is not None])[:, None]
    # a finite floor: rows without any token stay finite and are zeroed below
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) * (seen & token[:, None, :, None])).to(q.dtype)


def rebuilt(
    qkv: Tensor,  # (T, 3, H, D), or (T, H + 2 kv_heads, D)
    lse: Tensor,  # (H, T)
    s: LayerSettings,
    c: LayerCall,
    sequence: slice,
    heads: Sequence[int] | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """One sequence's softmax weights (heads, rows, L), fp32 or wider, from what an Observer sees; without gradients.

    P[i, j] = exp(scale q_i k_j + bias - lse_i). `rows` are offsets in the sequence; None stands for all heads, or rows.
    """
    kv_heads = s.heads if s.kv_heads is None else s.kv_heads
    part, lse = qkv.detach()[sequence], lse.detach()[:, sequence]
    part = part.to(torch.promote_types(part.dtype, torch.float32))
    q, k = (t.transpose(0, 1) for t in split(part, kv_heads)[:2])  # (H, L, D), (kv_heads, L, D)
    H, L, D = q.shape
    places = torch.arange(L, device=q.device)
    rows = places if rows is None else rows
    h = torch.arange(H, device=q.device)
    h = h if heads is None else h[list(heads)]
    if c.rotary is not None:
        q, k = (rotate(t, c.rotary.table, c.rotary.pairs) for t in (q, k))
    scores = q[h][:, rows] @ k[h * kv_heads // H].mT * (D**-0.5 if s.scale is None else s.scale)
    if c.bias is not None:
        middle = c.bias.shape[1] // 2
        scores = scores + c.bias.detach()[h][:, places[None, :] - rows[:, None] + middle]
    weights = (scores - lse[h][:, rows, None]).exp()
    hidden = hidden_keys(rows, places, *bounds(s.window, s.causal))
    return weights if hidden is None else weights.masked_fill(hidden, 0.0)


class Maps:
    """An Observer that keeps the maps `found` of the layers that call it: `rebuilt` of every sequence.

    A map is (B, heads, rows, S) in the dtype of qkv, with zeros at padding. `rows` and S are columns of the padded
    batch, or offsets in the sequences where the caller packed them.
    """

    def __init__(
        self,
        packing: Packing,
        heads: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.packing, self.heads, self.rows = packing, heads, rows
        self.found: list[Tensor] = []

    def __call__(self, qkv: Tensor, _: Tensor, lse: Tensor, s: LayerSettings, c: LayerCall) -> None:
        packing, heads = self.packing, self.heads
        starts = packing.cu_seqlens.tolist()
        S = packing.max_seqlen if packing.length is None else packing.length
        columns = packing.positions(qkv.shape[0])
        wanted = torch.arange(S, device=qkv.device)
        wanted = wanted if self.rows is None else wanted[list(self.rows)]
        count = s.heads if heads is None else len(heads)
        maps = qkv.new_zeros(packing.batch, count, len(wanted), S)
        for b in range(packing.batch):
            sequence = slice(starts[b], starts[b + 1])
            here = columns[sequence]
            row, offset = (wanted[:, None] == here[None, :]).nonzero(as_tuple=True)
            weights = rebuilt(qkv, lse, s, c, sequence, heads, offset).to(maps.dtype)
            maps[b, :, row[:, None], here] = weights
        self.found.append(maps)
