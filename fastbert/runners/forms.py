"""What attention of the native encoder reads beside a layer's weights, as csrc/cpu/encoder.h reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.backend import cpu
from fastbert.functional import Rotary


class Form(NamedTuple):
    """What one layer's attention reads beside its weights."""

    window: tuple[int, int] | None = None  # the tokens before and behind that a token sees
    rotary: Rotary | None = None
    bias: Tensor | None = None  # (H, 2 P - 1)


# a layer's window, its rotary table and `pairs`, its bias
Tables = tuple[tuple[int, int], Tensor | None, bool, Tensor | None]


def tables(forms: Sequence[Form]) -> list[Tables]:
    """What attention reads beside the weights, in memory that the native call can read."""
    given = [(None if f.rotary is None else f.rotary.table, f.bias) for f in forms]
    # layers share their tables
    ready = {id(t): cpu.fp32(t) for pair in given for t in pair}
    return [
        (f.window or (-1, -1), ready[id(table)], bool(f.rotary and f.rotary.pairs), ready[id(bias)])
        for f, (table, bias) in zip(forms, given, strict=True)
    ]


def addresses(found: Sequence[Tables]) -> Tensor | None:
    """Rows (n, 7) in the order of csrc/cpu/encoder.h; None where attention reads nothing else."""
    rows = [
        (
            *window,
            cpu.address(rotary),
            0 if rotary is None else rotary.shape[2],
            int(pairs),
            cpu.address(bias),
            0 if bias is None else (bias.shape[1] + 1) // 2,
        )
        for window, rotary, pairs, bias in found
    ]
    return torch.tensor(rows, dtype=torch.int64) if rows else None
