"""The choice of one size for every block: the least rise of the loss within a budget of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# cells of time that the budget is divided into
_CELLS = 20_000


def cheapest(
    losses: Sequence[Floats],  # of each block by the number of its size
    seconds: Sequence[Floats],  # as many
    budget: float,
) -> list[int] | None:
    """Choose a size for every block, so that the sum of losses is least and the sum of seconds fits the budget.

    Returns the index of each block's size, or None if no choice fits. A knapsack with one choice a block, by dynamic
    programming over cells of time; a block's time is rounded to cells.
    """
    if budget <= 0 or sum(float(s.min()) for s in seconds) > budget:
        return None
    cell = budget / _CELLS
    best = np.zeros(_CELLS + 1)
    chosen = []
    for loss, taken in zip(losses, seconds, strict=True):
        cells = np.rint(taken / cell).astype(np.int64)
        following = np.full_like(best, np.inf)
        choice = np.zeros(len(best), np.int64)
        for number, (more, shift) in enumerate(zip(loss, cells, strict=True)):
            if shift > _CELLS:
                continue
            # the cell `shift` further on, for every cell
            value = np.full_like(best, np.inf)
            value[shift:] = best[: len(best) - shift] + more
            better = value < following
            following[better], choice[better] = value[better], number
        best = following
        chosen.append((choice, cells))
    at = int(best.argmin())
    if not np.isfinite(best[at]):
        return None
    found = []
    for choice, cells in reversed(chosen):
        found.append(int(choice[at]))
        at -= int(cells[choice[at]])
    return found[::-1]
