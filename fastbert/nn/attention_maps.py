"""Attention weights as tensors, which the kernels never make: slow and large, for looking at."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.reference.attention_form import Rotary, bounds, hidden_keys, rotate
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
    token = packing.spread(torch.ones_like(qkv[:, 0, 0, 0], dtype=torch.bool))  # (B, S)
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
