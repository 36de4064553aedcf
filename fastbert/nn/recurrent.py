"""The layer of a recurrent encoder, which is called as an attention layer is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backend.reference.philox import dropout
from fastbert.backend.torch_private import exporting
from fastbert.nn.base import Block
from fastbert.nn.lstm import LSTM
from fastbert.ops.context import seed_for

NO_ATTENTION = "an LSTM has no attention"


class LSTMLayer(Block):
    """A bidirectional LSTM of C / 2 units a direction on packed tokens, then dropout: (T, C) -> (T, C), or (R, C).

    Weights are drawn as torch.nn.LSTM draws them, and the forget gates start open, with a bias of 1 (Jozefowicz et al.
    2015). `rows` are the rows to return; all of them are computed, since each state needs the one before it.
    """

    def __init__(self, hidden_size: int, *, p: float = 0.1) -> None:
        super().__init__()
        half = hidden_size // 2
        self.lstm = LSTM(hidden_size, half, bidirectional=True)
        self.p = p
        with torch.no_grad():
            for name, bias in self.lstm.named_parameters():
                if name.startswith("bias"):
                    bias.zero_()
                if name.startswith("bias_ih"):
                    # the gates are input, forget, cell and output
                    bias[half : 2 * half] = 1.0

    def forward(
        self,
        x: Tensor,  # (T, C)
        cu_seqlens: Tensor,  # (B + 1,) int32
        max_seqlen: int,
        seed: Tensor | None = None,
        site: int = 0,
        rows: Tensor | None = None,  # (R,) int64
        rotary: None = None,
    ) -> Tensor:
        if exporting():
            raise NotImplementedError(
                "an LSTM encoder reads packed tokens, which torch.nn.LSTM, as exporters find it, does not have: call "
                "the model itself, or export one with attention"
            )
        y: Tensor = self.lstm(x, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)[0]
        p = self.p if self.training else 0.0
        if p:
            y = dropout(y, p, seed_for(p, seed, y), site)
        return y if rows is None else y.index_select(0, rows)

    def probabilities(self, *arguments: Any) -> Tensor:
        """Raises ValueError: there are none."""
        raise ValueError(f"output_attentions is set and {NO_ATTENTION}: leave it out")
