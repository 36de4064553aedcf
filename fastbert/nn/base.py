"""What BERT's own blocks are made of: the linear layer, the class of all blocks, blocks without columns; and modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.nn.exports import refuse_script, replaces


class Linear(nn.Linear):
    """torch.nn.Linear through the `linear` op."""

    def reset_parameters(self) -> None:
        """Draw the weight and the bias as torch.nn does, of a matrix without numbers the bias alone."""
        if self.weight.numel():
            super().reset_parameters()
        elif self.bias is not None:
            nn.init.zeros_(self.bias)

    @replaces(nn.Linear)
    def forward(self, input: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return F.linear(input, self.weight, self.bias)


class Block(nn.Module):
    """The base of the blocks, which torch.jit.script refuses with a sentence."""

    __prepare_scriptable__ = refuse_script


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every part of the model has its own mode again."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def without_gradients(block: nn.Module) -> None:
    """Let parameters without numbers require no gradient: they never get one, and DistributedDataParallel waits."""
    for p in block.parameters():
        if not p.numel():
            p.requires_grad_(False)


def bias_alone(x: Tensor, last: nn.Module) -> Tensor:
    """The output (N, C) of a block that has no columns left for x (N, C): the bias of its last matrix, or zeros."""
    bias: Tensor | None = last.bias  # type: ignore[assignment]
    if bias is None:
        return torch.zeros_like(x)
    return bias.to(x.dtype).expand(x.shape[0], -1)


def sinusoidal_positions(positions: int, hidden_size: int) -> Tensor:
    """The (P, C) fp32 position table of Vaswani et al., Attention is all you need (2017); C may be odd.

    table[p, 2i] = sin(p / 10000^(2i / C)),  table[p, 2i + 1] = cos(p / 10000^(2i / C))
    """
    column = torch.arange(hidden_size, dtype=torch.float64)
    rate = 10000.0 ** (-2.0 * (column // 2) / hidden_size)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * rate
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()
