"""Masked-LM masking (Devlin et al. 2018, section 3.1) of many packed sequences at once, dynamic as in RoBERTa."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastbert.data import rng
from fastbert.data.settings import check_mask_prob
from fastbert.data.tokenizer import SpecialIds, vocabulary, word_starts

I64 = NDArray[np.int64]
IGNORE = -100

# what replaces a chosen token: [MASK] below the first, a random token below the second, itself above
_MASK_BELOW, _RANDOM_BELOW = 0.8, 0.9
# independent draws at one token, or of a whole sequence
_CHOICE, _COUNT, _BOUNDARY, _ACTION, _TOKEN = range(5)


class Masked(NamedTuple):
    """Masked packed tokens."""

    input_ids: I64  # (T,) what the model sees
    labels: I64  # (T,) the original token where it is predicted, else -100
    label_rows: I64  # (R,) the rows that are predicted, ascending


class Masker:
    """Chooses `prob` of every sequence's tokens; of these 80 % become [MASK], 10 % a random token, 10 % stay.

    Special tokens and padding are never chosen, and a random token is never special. A sequence of n tokens has
    prob * n chosen, rounded up or down at random so that the expectation is exact, and at least one. With `whole_word`
    all pieces of a word are chosen together. Raises ValueError for prob outside (0, 1) or a tokenizer without the
    special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prob: float = 0.15, whole_word: bool = False) -> None:
        check_mask_prob(prob)
        self.prob = prob
        self.special = SpecialIds.of(tokenizer)
        size = len(vocabulary(tokenizer))
        self._maskable = np.ones(size, bool)
        self._maskable[list(self.special.all)] = False
        self._ordinary = np.flatnonzero(self._maskable)
        self._starts = word_starts(tokenizer) if whole_word else np.ones(size, bool)

    @staticmethod
    def keys(seed: int, epoch: int, examples: I64) -> rng.U64:
        """(B,) the keys of these examples' masks, the same in whatever batch an example is."""
        return rng.bits(rng.derive(seed, epoch, rng.Purpose.MASKS), examples)

    def __call__(
        self,
        ids: I64,  # (T,) packed tokens
        cu_seqlens: NDArray[np.int32] | I64,  # (B + 1,)
        keys: rng.U64,  # (B,)
    ) -> Masked:
        """Mask a packed batch; raises IndexError for an id outside the vocabulary."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self._maskable):
            raise IndexError(
                f"the ids go from {ids.min()} to {ids.max()}, the vocabulary from 0 to {len(self._maskable) - 1}: "
                "encode with the same tokenizer"
            )
        lengths = np.diff(cu_seqlens).astype(np.int64)
        sequence = np.repeat(np.arange(len(lengths)), lengths)  # (T,)
        column = np.arange(len(ids)) - np.asarray(cu_seqlens, np.int64)[sequence]  # (T,)
        rows = self._choose(ids, sequence, column, keys)
        labels = np.full(len(ids), IGNORE, np.int64)
        labels[rows] = ids[rows]
        return Masked(self._replace(ids, rows, keys[sequence[rows]], column[rows]), labels, rows)

    def _choose(self, ids: I64, sequence: I64, column: I64, keys: rng.U64) -> I64:
        """(R,) the rows that are predicted."""
        maskable = self._maskable[ids]
        rows = np.flatnonzero(maskable)  # (M,)
        counts = np.bincount(sequence[rows], minlength=len(keys))  # (B,) maskable tokens
        exact = self.prob * counts
        quota = np.floor(exact + rng.uniform(keys, np.array([_COUNT]))).astype(np.int64)

        # a word begins at a token that says so, and after a special token or another sequence
        begins = self._starts[ids[rows]] | (np.diff(rows, prepend=-2) > 1) | (column[rows] == 0)
        word = np.cumsum(begins) - 1  # (M,)
        head = rows[begins]  # (W,) first row of each word
        size = np.bincount(word, minlength=len(head))  # (W,)
        owner = sequence[head]  # (W,)
        # words of a sequence in random order: its number in the high bits, 40 random bits below
        order = rng.bits(keys[owner], _counter(column[head], _CHOICE)) >> np.uint64(24)
        order = np.argsort((owner.astype(np.uint64) << np.uint64(40)) | order)
        taken = np.cumsum(size[order])
        first = np.cumsum(counts) - counts  # (B,) maskable tokens of earlier sequences
        after = taken - first[owner[order]]
        before = after - size[order]
        # the word that crosses the quota is taken with the probability that makes the expectation the quota
        share = (quota[owner[order]] - before) / size[order]
        crossing = rng.uniform(keys, np.array([_BOUNDARY]))[owner[order]] < share
        # the first word is taken in any case, so that every sequence has a label
        chosen = np.zeros(len(head), bool)
        chosen[order] = (before == 0) | (after <= quota[owner[order]]) | crossing
        return rows[chosen[word]]

    def _replace(self, ids: I64, rows: I64, keys: rng.U64, column: I64) -> I64:
        action = rng.uniform(keys, _counter(column, _ACTION))  # (R,)
        random = self._ordinary[rng.integers(keys, _counter(column, _TOKEN), len(self._ordinary))]
        replaced = np.where(action < _RANDOM_BELOW, random, ids[rows])
        result = ids.copy()
        result[rows] = np.where(action < _MASK_BELOW, self.special.mask, replaced)
        return result


def _counter(column: I64, draw: int) -> I64:
    """Another number for every (column, draw); 0 to 7 are for the sequence as a whole."""
    return (column + 1) * 8 + draw
