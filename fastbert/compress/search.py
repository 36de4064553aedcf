"""The choice of one size for every block: the least loss within a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# cells of time that the budget is divided into
_CELLS = 20_000
# share of the factors that a try changes; draws a try at most, as many factors lead to the same sizes
_SHARE, _DRAWS = 0.25, 5


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


class Search:
    """A random search for factors of the blocks' losses, judged by the actual loss of the sizes that follow from them.

    The rise of the loss is estimated for each block by itself. A factor a block makes up for the effect that blocks
    have on each other. (Frantar & Alistarh, SPDY, 2022; Kurtic et al., ZipLM, 2023.)
    """

    def __init__(
        self,
        estimates: Sequence[Floats],  # of each block by the number of its size
        starts: Sequence[Floats],  # factors to begin with, one a block each
        loss: Callable[[list[int]], float],  # of the model with these numbers of sizes
        seed: int = 0,
    ) -> None:
        self.estimates = estimates
        # the factors that later ones are made from: the best so far
        self.starts = [*starts]
        self._loss = loss
        self._losses: dict[tuple[int, ...], float] = {}
        self._draw = np.random.default_rng(seed)

    def run(
        self, seconds: Sequence[Floats], budget: float, tries: int, limit: float
    ) -> tuple[float, list[int]] | None:
        """The least loss of at most `tries` choices, in about `limit` seconds, and its sizes; None if none fit."""
        end = time.monotonic() + limit
        best: tuple[float, list[int]] | None = None
        leader = self.starts[0]
        tried: set[tuple[int, ...]] = set()
        for draw in range(_DRAWS * tries):
            factors = self.starts[draw] if draw < len(self.starts) else self._changed(leader)
            losses = [f * e for f, e in zip(factors, self.estimates, strict=True)]
            sizes = cheapest(losses, seconds, budget)
            if sizes is None:
                return None
            loss = self._once(sizes)
            if best is None or loss < best[0]:
                best, leader = (loss, sizes), factors
            tried.add(tuple(sizes))
            if len(tried) == tries or (draw + 1 >= len(self.starts) and time.monotonic() > end):
                break
        self.starts = [leader]
        return best

    def _once(self, sizes: list[int]) -> float:
        key = tuple(sizes)
        if key not in self._losses:
            self._losses[key] = self._loss(sizes)
        return self._losses[key]

    def _changed(self, factors: Floats) -> Floats:
        """The factors with some of them, at least one, multiplied by random numbers."""
        some = self._draw.random(len(factors)) < _SHARE
        some[self._draw.integers(len(factors))] = True
        return factors * np.exp(self._draw.standard_normal(len(factors)) * some)
