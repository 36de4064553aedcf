"""A word table that is also the masked-LM decoder's weight, with one gradient for both uses."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.backend.torch_private import exporting, functorch_active, legacy_batched, use_count
from fastbert.ops import _check


class _Tied(torch.autograd.Function):
    """A table (V, C), and its rows at `ids` (T, C)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.padding, ctx.size = padding, table.shape[0]
        return table.view_as(table), table.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, table: Tensor | None, rows: Tensor | None) -> Any:
        if rows is None:
            return table, None, None
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None and bool((padding := ids == ctx.padding).any()):
            rows = rows.masked_fill(padding[:, None], 0)
        # a hook may have kept the decoder's gradient
        own = table is None or _references(table) == _alone()
        if table is None:
            table = rows.new_zeros(ctx.size, rows.shape[1])
        # in a recorded or batched backward the gradient stays as it is
        own = own and not (torch.is_grad_enabled() or legacy_batched(table) or legacy_batched(rows))
        add = table.index_add_ if own else table.index_add
        return add(0, ids, rows), None, None


class _Probe(torch.autograd.Function):
    """Counts the references to a gradient in a backward, where nothing but autograd has it."""

    found: tuple[int, int]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _Probe.found = _references(grad)
        return grad


def _references(t: Tensor) -> tuple[int, int]:
    return sys.getrefcount(t), use_count(t)


@functools.cache
def _alone() -> tuple[int, int]:
    with torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        torch.autograd.grad(2 * _Probe.apply(x), x)
    return _Probe.found


def tied(
    word: nn.Module,  # Embedding, or another table
    ids: Tensor,  # (T,) int64
) -> tuple[Tensor, Tensor] | None:
    """The table (V, C) for the decoder and its rows (T, C) for the encoder; None where both are to read `word.weight`.

    Autograd sums the gradients of the two uses. That of the encoder has few rows that are not zero, and takes as much
    memory as the table. With this pair, which serves training on a CPU, the rows are added to the decoder's gradient.
    """
    if not isinstance(word, nn.Embedding):
        return None
    table = word.weight
    recorded = torch.is_grad_enabled() and table.requires_grad and ids.dtype == torch.int64
    special = torch.compiler.is_compiling() or exporting() or functorch_active()
    if not recorded or special or table.device.type != "cpu" or ids.device.type != "cpu":
        return None
    _check.word_ids(ids, table.shape[0])
    _alone()
    return _Tied.apply(table, ids, word.padding_idx)
