"""Timing competitors side by side, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the 20th and 80th percentiles over some rounds."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The percentiles of some measurements."""
        p20, median, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
        return cls(median, p20, p80, len(seconds))


def interleave(
    competitors: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 3
) -> dict[str, Timing]:
    """Call every competitor once per round, in an order that rotates, and time each call.

    `warmup` rounds are not counted. On a GPU a call ends when the device is done. Raises ValueError without
    competitors or rounds.
    """
    if not competitors or rounds < 1 or warmup < 0:
        raise ValueError(
            f"{len(competitors)} competitors in {rounds} rounds after {warmup}: nothing can be timed"
        )
    names = list(competitors)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        # whoever follows the same neighbour every time would always find the same caches
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = _time(competitors[name])
            if number >= 0:
                seconds[name].append(taken)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _time(call: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
