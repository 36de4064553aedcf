"""Random numbers as a pure function of (key, counter), for whole arrays at once.

A generator with a state would tie an example's masks to the examples drawn before it; these depend on nothing but the
seed, the epoch and the example, so batch size, rank, worker and a resumed run can't change them. The function is
SplitMix64 (Steele, Lea, Flood 2014) with the key as its seed.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))

U64 = NDArray[np.uint64]


class Purpose(IntEnum):
    """The last part of a key: draws of different purposes are independent. Other values are other data in every run."""

    HELD_OUT_DOCUMENTS = 1
    PAIRS = 10
    RANDOM_NEXT = 11
    DOCUMENTS = 12
    MASKS = 20
    BATCHES = 30
    # fine-tuning: the examples held out, and the order of an epoch
    EXAMPLES = 40
    # distillation: tokens that others take the place of
    REPLACED = 50
    # images beside text: those held out; in each epoch their order and their captions
    HELD_OUT_IMAGES = 2
    IMAGES = 60
    CAPTIONS = 61


def bits(key: U64, counter: NDArray[np.int64] | NDArray[np.uint64]) -> U64:
    """64 random bits for every (key, counter); the arrays are broadcast."""
    x = (
        np.asarray(key, np.uint64)
        + (np.asarray(counter).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    )
    x = (x ^ (x >> _SHIFTS[0])) * _MIX[0]
    x = (x ^ (x >> _SHIFTS[1])) * _MIX[1]
    return x ^ (x >> _SHIFTS[2])


def derive(*parts: int) -> U64:
    """A key of shape (1,) from some integers, such as a seed, an epoch and a purpose."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = bits(key, np.array([part % (1 << 64)], np.uint64))
    return key


def uniform(key: U64, counter: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform in [0, 1) with 53 bits."""
    return (bits(key, counter) >> np.uint64(11)) * 2.0**-53


def integers(
    key: U64, counter: NDArray[np.int64] | NDArray[np.uint64], high: NDArray[np.int64] | int
) -> NDArray[np.int64]:
    """Uniform in [0, high) for every element; high >= 1."""
    return (uniform(key, counter) * high).astype(np.int64)
