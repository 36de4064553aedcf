"""Packed rows as a padded batch, for stock ops that take no packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.torch_private import exporting


class Layout:
    """Where packed rows lie in a padded (B, S) layout, computed without a host sync."""

    def __init__(self, cu_seqlens: Tensor, T: int, S: int) -> None:
        cu = cu_seqlens.long()
        device = cu.device
        if device.type == "cpu" and not exporting():
            # max_seqlen may be generous, and reading the lengths costs nothing here
            S = max(1, int(cu.diff().max()))
        self.B, self.S = cu.shape[0] - 1, S
        column = torch.arange(S, device=device)
        self.valid = column < cu.diff()[:, None]  # (B, S)
        # padding reads its own sequence's first row
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

    def scores(
        self,
        q: Tensor,  # (B, H, Q, D)
        k: Tensor,  # (B, H, S, D)
        scale: float,
        hidden: Tensor | None = None,  # (Q, S) bool
        bias: Tensor | None = None,  # (H, Q, S)
    ) -> Tensor:
        """scale q k^T + bias (B, H, Q, S) in q's dtype, -inf where `hidden` and at keys past a sequence's end."""
        H = q.shape[1]
        padding = ~self.valid[:, None, :]  # (B, 1, S)
        # a padding query sees all tokens: no weights at all are NaN
        hidden = padding if hidden is None else padding | (hidden & self.valid[:, :, None])
        zeros = torch.zeros((), dtype=q.dtype, device=q.device)
        # one call multiplies, scales, adds and masks
        if bias is None:
            bias = zeros.where(~hidden, -torch.inf).repeat_interleave(H, 0)
        else:
            bias = bias.to(q.dtype).masked_fill(hidden[:, None], -torch.inf).flatten(0, 1)
        product = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
        return product.view(self.B, H, -1, self.S)
