"""attention by stock ops on padded sequences: SDPA where nothing is saved or dropped, else matmul and softmax.

SDPA neither takes a dropout mask nor returns the log-sum-exp that backward needs, so training goes the explicit way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.reference import philox


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


class _Layout:
    """Where packed rows lie in a padded (B, S) layout, computed without a host sync."""

    def __init__(self, cu_seqlens: Tensor, T: int, S: int) -> None:
        cu = cu_seqlens.long()
        device = cu.device
        self.B, self.S = cu.shape[0] - 1, S
        column = torch.arange(S, device=device)
        self.valid = column < cu.diff()[:, None]  # (B, S)
        # padding reads the sequence's own first row, never a row that belongs to nobody
        self.row = torch.where(self.valid, cu[:-1, None] + column, cu[:-1, None]).clamp(max=T - 1)
        token = torch.arange(T, device=device)
        sequence = torch.searchsorted(cu[1:].contiguous(), token, right=True)
        self.tail = sequence >= self.B  # (T,)
        sequence = sequence.clamp(max=self.B - 1)
        self.cell = sequence * S + (token - cu[sequence]).clamp(max=S - 1)

    def pad(self, packed: Tensor) -> Tensor:
        """(T, [3,] H, D) -> (B, H, [3,] S, D)."""
        return packed[self.row].transpose(1, -2)

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, H, S, ...) -> (T, H, ...), zeros in the tail."""
        rows = padded.transpose(1, 2).flatten(0, 1)[self.cell]
        return rows.masked_fill(self.tail.view(-1, *[1] * (rows.dim() - 1)), 0.0)

    def hidden(self, causal: bool) -> Tensor:
        """Boolean (B, 1, 1 or S, S): the keys a query must not see."""
        hidden = ~self.valid[:, None, None, :]
        if causal:
            hidden = hidden | torch.ones(
                self.S, self.S, dtype=torch.bool, device=hidden.device
            ).triu(1)
        return hidden


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (scale * q @ k.transpose(-2, -1)).to(wide).masked_fill_(hidden, float("-inf"))


def _dropped(t: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """t (B, H, S, S) with dropout's factor applied; the counters do not depend on the padding."""
    if p == 0.0 or seed is None:
        return t
    B, H, S, _ = t.shape
    bh = torch.arange(B * H, device=t.device).view(B, H)
    keep = philox.attention_keep_mask(seed, site, bh, S, S, p)
    return torch.where(keep, t * (1.0 / (1.0 - p)), 0.0)


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
    layout = _Layout(cu_seqlens, T, max_seqlen)
    q, k, v = layout.pad(qkv).unbind(2)  # each (B, H, S, D)
    hidden = layout.hidden(causal)
    if not save and p == 0.0:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return layout.unpad(sdpa(q, k, v, ~hidden, scale=scale)), qkv.new_empty(H, 0, dtype=wide)
    scores = _scores(q, k, scale, hidden)
    lse = scores.logsumexp(-1)
    P = _dropped(scores.sub_(lse[..., None]).exp_(), p, seed, site).to(v.dtype)
    out = layout.unpad(P @ v)
    return out, layout.unpad(lse).t().contiguous() if save else qkv.new_empty(H, 0, dtype=wide)


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
    layout = _Layout(cu_seqlens, T, max_seqlen)
    q, k, v = layout.pad(qkv).unbind(2)
    # a padding query repeats a real row: its gradient must not count
    do = layout.pad(dout).masked_fill(~layout.valid[:, None, :, None], 0.0)
    padded_lse = lse.t()[layout.row].transpose(1, 2)  # (B, H, S)
    delta = (dout.to(lse.dtype) * out).sum(-1)[layout.row].transpose(1, 2)
    P = _scores(q, k, scale, layout.hidden(causal)).sub_(padded_lse[..., None]).exp_()
    dv = _dropped(P, p, seed, site).to(v.dtype).transpose(-2, -1) @ do
    dP = _dropped((do @ v.transpose(-2, -1)).to(lse.dtype), p, seed, site)
    dS = (
        (P * (dP - delta[..., None])).masked_fill_(~layout.valid[:, None, :, None], 0.0).to(q.dtype)
    )
    grads = (scale * (dS @ k), scale * (dS.transpose(-2, -1) @ q), dv)
    return torch.stack([layout.unpad(t) for t in grads], 1)
