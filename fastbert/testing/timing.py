"""Timing calls side by side, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastbert.backend import torch_private

# cycles, about three milliseconds: time for a slow host to enqueue a forward and a backward
_SLEEP = 6_000_000


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
    calls: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 3
) -> dict[str, Timing]:
    """Time each of these calls once per round, in an order that rotates.

    `warmup` rounds are not counted. On a GPU a call ends when the device is done. Raises ValueError without calls or
    rounds.
    """
    if not calls or rounds < 1 or warmup < 0:
        raise ValueError(
            f"{len(calls)} calls in {rounds} rounds after {warmup}: nothing can be timed"
        )
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in rotated(names, number):
            taken = _time(calls[name])
            if number >= 0:
                seconds[name].append(taken)
    return {name: Timing.of(values) for name, values in seconds.items()}


def interleave_training(
    calls: Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]],
    seconds: float,
    rounds: tuple[int, int] = (3, 200),
) -> dict[str, dict[str, Timing]]:
    """Time (forward, backward) pairs in rotating order: {name: {"forward", "backward", "both": Timing}}.

    Each backward takes what its own forward has just returned, so that no graph is kept for longer than a training
    step keeps it. There are as many rounds as fit into `seconds`, within the bounds `rounds`; callers warm up. On a GPU
    these are the device's times, from cold caches; up to three milliseconds of the host's launches are hidden. Raises
    ValueError without calls or with bounds that allow no round.
    """
    least, most = rounds
    if not calls or not 1 <= least <= most:
        raise ValueError(f"{len(calls)} calls in {least} to {most} rounds: nothing can be timed")
    names = list(calls)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    done = 0
    while done < least or (done < most and time.perf_counter() < end):
        for name in rotated(names, done):
            taken[name].append(_time_pair(*calls[name]))
        done += 1
    return {
        name: {
            "forward": Timing.of([f for f, _ in pairs]),
            "backward": Timing.of([b for _, b in pairs]),
            "both": Timing.of([f + b for f, b in pairs]),
        }
        for name, pairs in taken.items()
    }


def rotated(names: list[str], number: int) -> list[str]:
    """The order of a round, rotated by its number, so that no call is first, with its caches, in every round."""
    shift = number % len(names)
    return names[shift:] + names[:shift]


def _time_pair(
    forward: Callable[[], Any], backward: Callable[[Any], object]
) -> tuple[float, float]:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return _time_pair_on_device(forward, backward)
    started = time.perf_counter()
    y = forward()
    _wait()
    between = time.perf_counter()
    backward(y)
    _wait()
    return between - started, time.perf_counter() - between


def _time_pair_on_device(
    forward: Callable[[], Any], backward: Callable[[Any], object]
) -> tuple[float, float]:
    """Times between CUDA events, after a write of 256 MB that empties caches and a wait that lets the host enqueue."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
    torch_private.sleep(_SLEEP)
    events[0].record()
    y = forward()
    events[1].record()
    backward(y)
    events[2].record()
    events[2].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3, events[1].elapsed_time(events[2]) / 1e3


def _time(call: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
