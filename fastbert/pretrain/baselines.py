"""What counting alone predicts at held-out [MASK] positions: unigrams and interpolated left/right bigrams.

A masked language model that uses context must beat both at the very same positions. Losses are means in nats, and
everything is plain integer arrays. The counts come from the training stream as the model sees it before masking, with
a negative id wherever two neighbours in the array are not neighbours in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]
Floats = NDArray[np.float64]

HIDDEN = -1  # a neighbour that is masked or lies outside the sequence
IGNORED = -100  # a label that is not to be predicted
BUCKETS = 6  # of a context's count: 0, 1-9, 10-99, ..., 10,000 and more


@dataclass(frozen=True)
class Baselines:
    """Mean losses in nats at the `count` positions whose input is [MASK]; NaN where there is none."""

    unigram: float
    bigram: float
    count: int


def unigram_estimate(train_ids: Ids, vocab_size: int, special_ids: Sequence[int] = ()) -> Floats:
    """Add-one estimates (V,) from train_ids (T,); specials, which are never a target, get 0."""
    if train_ids.size and int(train_ids.max()) >= vocab_size:
        raise IndexError(f"train_ids holds {train_ids.max()}: ids must be below {vocab_size}")
    counts = np.bincount(train_ids[train_ids >= 0], minlength=vocab_size) + 1.0
    counts[list(special_ids)] = 0.0
    return counts / counts.sum()


def cross_entropy(probabilities: Floats) -> float:
    """Mean loss in nats of the targets' probabilities (N,); NaN for none."""
    return float(-np.log(probabilities).mean()) if probabilities.size else float("nan")


class BigramBaseline:
    """p(w | left, right) = a p(w | left) + b p(w | right) + c p(w) (Jelinek and Mercer 1980).

    The bigrams are maximum-likelihood estimates, p(w) is the add-one unigram. The weights a, b, c depend on how often
    left and right were seen (a hidden neighbour: never); `fit` tunes them.
    """

    def __init__(self, train_ids: Ids, vocab_size: int, special_ids: Sequence[int] = ()) -> None:
        self.vocab_size = vocab_size
        self.unigram = unigram_estimate(train_ids, vocab_size, special_ids)
        self.weights = np.full((BUCKETS * BUCKETS, 3), 1.0 / 3.0)
        inside = (train_ids[:-1] >= 0) & (train_ids[1:] >= 0)
        left, right = train_ids[:-1][inside].astype(np.int64), train_ids[1:][inside]
        self.pairs, self.pair_counts = np.unique(left * vocab_size + right, return_counts=True)
        # totals leave out special neighbours, which are never a target, so that every estimate sums to 1
        word = self.unigram > 0.0
        self.as_left = np.bincount(left[word[right]], minlength=vocab_size)
        self.as_right = np.bincount(right[word[left]], minlength=vocab_size)

    @classmethod
    def fit(
        cls, train_ids: Ids, vocab_size: int, special_ids: Sequence[int] = (), *, mask: float = 0.15
    ) -> BigramBaseline:
        """Weights by EM on the last 5 % of train_ids (T,), masked like the model's input; then counts of all of it."""
        cut = len(train_ids) - len(train_ids) // 20 - 1
        model = cls(train_ids[:cut], vocab_size, special_ids)
        parts, cases = model._parts(*_corrupted(train_ids[cut:], model.unigram, mask))
        weights = model.weights
        for _ in range(100):
            shares = weights[cases] * parts
            shares /= shares.sum(1, keepdims=True)
            # each weight gets 1/3 of a target more, so that a case without targets keeps equal weights
            totals = [np.bincount(cases, part, minlength=len(weights)) + 1 / 3 for part in shares.T]
            weights = np.stack(totals, 1) / np.sum(totals, 0)[:, None]
        model = cls(train_ids, vocab_size, special_ids)
        model.weights = weights
        return model

    def probability(self, targets: Ids, left: Ids, right: Ids) -> Floats:
        """p(target | left, right) (N,) for ids (N,); a negative neighbour is hidden."""
        parts, cases = self._parts(targets, left, right)
        weights = self.weights[cases]
        # a neighbour that was never seen predicts nothing: its weight goes to the other estimates
        weights[:, 0] *= _at(self.as_left, left) > 0
        weights[:, 1] *= _at(self.as_right, right) > 0
        return (weights * parts).sum(1) / weights.sum(1)

    def _parts(self, targets: Ids, left: Ids, right: Ids) -> tuple[Floats, Ids]:
        """The three estimates (N, 3), and the rows (N,) of their weights."""
        lefts, rights = _at(self.as_left, left), _at(self.as_right, right)
        by_left = self._joint(left, targets) / np.maximum(lefts, 1)
        by_right = self._joint(targets, right) / np.maximum(rights, 1)
        cases = _bucket(lefts) * BUCKETS + _bucket(rights)
        return np.stack([by_left, by_right, self.unigram[targets]], 1), cases

    def _joint(self, left: Ids, right: Ids) -> Ids:
        """How often `left right` stands in the training stream (N,)."""
        keys = left.astype(np.int64) * self.vocab_size + right
        places = np.searchsorted(self.pairs[:-1], keys)
        found = (self.pairs[places] == keys) & (left >= 0) & (right >= 0)
        return np.where(found, self.pair_counts[places], 0)


def mask_baselines(
    train_ids: Ids,
    input_ids: Sequence[Ids],
    labels: Sequence[Ids],
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int] = (),
) -> Baselines:
    """Both baselines where the input is [MASK], from the neighbours that the model sees there.

    train_ids (T,), negative at boundaries; input_ids and labels: sequences (S_i,), -100 = not labelled; special_ids
    are never a target. Raises ValueError for other shapes and special targets, IndexError for ids out of range.
    """
    targets, left, right = masked_targets(input_ids, labels, mask_id)
    if targets.size and not 0 <= targets.min() <= targets.max() < vocab_size:
        raise IndexError(f"labels run {targets.min()}..{targets.max()}: pass 0..{vocab_size - 1}")
    if special := set(special_ids) & set(targets.tolist()):
        raise ValueError(f"special ids {sorted(special)} are labels: specials are never masked")
    model = BigramBaseline.fit(train_ids, vocab_size, special_ids)
    bigram = cross_entropy(model.probability(targets, left, right))
    return Baselines(cross_entropy(model.unigram[targets]), bigram, len(targets))


def masked_targets(
    input_ids: Sequence[Ids], labels: Sequence[Ids], mask_id: int
) -> tuple[Ids, Ids, Ids]:
    """The labels (N,) where the input is [MASK], and the ids left and right of them, -1 where hidden."""
    ids, wanted = [np.array([HIDDEN])], [np.array([IGNORED])]
    for i, (row, label) in enumerate(zip(input_ids, labels, strict=True)):
        if row.shape != label.shape or row.ndim != 1:
            raise ValueError(
                f"sequence {i}: {row.shape} input_ids, {label.shape} labels: pass (S,)"
            )
        ids += [row, np.array([HIDDEN])]
        wanted += [label, np.array([IGNORED])]
    flat, targets = np.concatenate(ids), np.concatenate(wanted)
    at = np.flatnonzero((flat == mask_id) & (targets != IGNORED))
    seen = np.where(flat == mask_id, HIDDEN, flat)
    return targets[at], seen[at - 1], seen[at + 1]


def _corrupted(ids: Ids, unigram: Floats, mask: float) -> tuple[Ids, Ids, Ids]:
    """Every word of ids (T,) between its neighbours as masking leaves them: 80 % hidden, 10 % random, 10 % kept."""
    rng = np.random.default_rng(0)
    word = (ids >= 0) & (unigram[np.maximum(ids, 0)] > 0.0)
    draw = np.where(word, rng.random(len(ids)), 1.0)
    noise = rng.choice(np.flatnonzero(unigram), len(ids))
    seen = np.where(draw < 0.8 * mask, HIDDEN, np.where(draw < 0.9 * mask, noise, ids))
    seen = np.pad(seen, 1, constant_values=HIDDEN)
    return ids[word], seen[:-2][word], seen[2:][word]


def _at(counts: Ids, context: Ids) -> Ids:
    return np.where(context >= 0, counts[np.maximum(context, 0)], 0)


def _bucket(counts: Ids) -> Ids:
    """0 for a context never seen, else the number of digits of its count, at most BUCKETS - 1."""
    return np.searchsorted(10 ** np.arange(BUCKETS - 1), counts, side="right")
