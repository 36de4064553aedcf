"""The counting baselines on chains whose answers are known."""

import numpy as np
import pytest

from fastbert.pretrain.baselines import (
    BigramBaseline,
    mask_baselines,
    masked_targets,
    unigram_estimate,
)

MASK, IGNORED = 4, -100


def chain(transition: np.ndarray, length: int, seed: int) -> np.ndarray:
    """A walk (length,) by the row-stochastic transition (V, V), from state 0."""
    rng = np.random.default_rng(seed)
    steps = np.cumsum(transition, 1)
    walk = np.zeros(length, np.int64)
    for i, draw in enumerate(rng.random(length - 1)):
        walk[i + 1] = np.searchsorted(steps[walk[i]], draw)
    return walk


def entropy(p: np.ndarray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def masked_every(walk: np.ndarray, step: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The walk in sequences of 50 with every `step`-th token masked and labelled."""
    hit = np.arange(len(walk)) % step == 1
    ids, labels = np.where(hit, MASK, walk), np.where(hit, walk, IGNORED)
    return list(ids.reshape(-1, 50)), list(labels.reshape(-1, 50))


def test_add_one_unigram():
    found = unigram_estimate(np.array([5, 5, 6, -1, 2]), 8, special_ids=[0, 1, 2, 3, 4])
    np.testing.assert_allclose(found, [0, 0, 0, 0, 0, 3 / 6, 2 / 6, 1 / 6])


@pytest.mark.parametrize("backward", [False, True], ids=["left", "right"])
def test_one_neighbour_decides(backward):
    # forwards each word has two successors, 5 -> 5|6, 6 -> 7|8, 7 -> 5|6, 8 -> 7|8: a neighbour halves the unigram's
    # loss, from log 4 to log 2
    p = np.zeros((9, 9))
    p[:5, 5] = 1.0
    for state, after in ((5, (5, 6)), (6, (7, 8)), (7, (5, 6)), (8, (7, 8))):
        p[state, list(after)] = 0.5
    walk = chain(p, 20_000, seed=1)[10:]
    train, test = walk[:15_000], walk[15_000:19_000]
    if backward:
        train, test = train[::-1], test[::-1]
    ids, labels = masked_every(test, 7)
    found = mask_baselines(train, ids, labels, MASK, 9, special_ids=range(5))
    assert found.count == sum((row == MASK).sum() for row in ids)
    assert found.unigram == pytest.approx(np.log(4), abs=0.01)
    assert found.bigram == pytest.approx(np.log(2), abs=0.02)


def test_an_order_only_one_way():
    # tokens are pairs (a, a + 4) with random a. At a masked `a` the right neighbour decides the word and the left one
    # tells nothing about it
    rng = np.random.default_rng(2)
    first = rng.integers(5, 9, 20_000)
    stream = np.stack([first, first + 4], 1).reshape(-1)
    inputs = stream[:4000].copy().reshape(-1, 50)
    labels = np.full_like(inputs, IGNORED)
    labels[:, 10] = inputs[:, 10]
    inputs[:, 10] = MASK
    found = mask_baselines(stream[4000:], list(inputs), list(labels), MASK, 13, range(5))
    assert found.unigram == pytest.approx(np.log(8), abs=0.01)
    # the mixture's weights do not depend on the words. In training half of the words follow from the left neighbour and
    # half from the right one, so both weights are 1/2, of the probabilities 1/4 and 1
    assert found.bigram == pytest.approx(-np.log(0.5 + 0.5 / 4), abs=0.03)


def test_hidden_neighbours_leave_the_unigram():
    stream = np.tile([5, 6, 7, 7], 2000)
    ids, labels = [np.array([MASK, MASK, MASK])], [np.array([IGNORED, 7, IGNORED])]
    found = mask_baselines(stream, ids, labels, MASK, 8, special_ids=range(5))
    assert found.count == 1
    assert found.bigram == pytest.approx(found.unigram, abs=1e-9)
    assert found.unigram == pytest.approx(np.log(2), abs=1e-3)


def test_probabilities_sum_to_one():
    rng = np.random.default_rng(3)
    stream = rng.integers(2, 30, 5000) // 2 * 2  # odd ids do not occur; 2 is a special token
    model = BigramBaseline.fit(np.where(rng.random(5000) < 0.02, -1, stream), 30, [0, 1, 2, 3])
    words = np.arange(4, 30)
    for left, right in ((6, 8), (-1, 8), (6, -1), (-1, -1), (7, 8), (2, 9), (7, 9)):
        p = model.probability(words, np.full(26, left), np.full(26, right))
        assert p.sum() == pytest.approx(1.0, abs=1e-9), (left, right)
        assert (p > 0).all()


def test_boundaries_are_not_bigrams():
    joined, parted = np.tile([5, 6], 500), np.tile([5, 6, -1], 500)
    word, left, hidden = np.array([5]), np.array([6]), np.array([-1])
    by = [
        BigramBaseline.fit(s, 7, range(5)).probability(word, left, hidden) for s in (joined, parted)
    ]
    assert by[0] > 0.9
    assert by[1] == pytest.approx(0.5, abs=0.01)


def test_only_masked_inputs_are_judged():
    ids = [np.array([2, MASK, 7, 6, 3]), np.array([2, 9, MASK, MASK, 3])]
    labels = [np.array([-100, 5, 8, -100, -100]), np.array([-100, -100, 7, -100, -100])]
    targets, left, right = masked_targets(ids, labels, MASK)
    assert targets.tolist() == [5, 7]
    assert left.tolist() == [2, 9]
    assert right.tolist() == [7, -1]


def test_nothing_masked_is_nan():
    found = mask_baselines(
        np.array([5, 6, 5, 6]), [np.array([5, 6])], [np.array([5, -100])], MASK, 7
    )
    assert found.count == 0
    assert np.isnan([found.unigram, found.bigram]).all()


def test_refusals():
    stream, ids = np.array([5, 6, 5, 6]), [np.array([5, MASK])]
    with pytest.raises(ValueError, match=r"sequence 0: \(2,\) input_ids, \(3,\) labels"):
        mask_baselines(stream, ids, [np.array([1, 2, 3])], MASK, 7)
    with pytest.raises(ValueError, match=r"special ids \[3\] are labels"):
        mask_baselines(stream, ids, [np.array([-100, 3])], MASK, 7, special_ids=[3])
    with pytest.raises(IndexError, match=r"labels run 9\.\.9"):
        mask_baselines(stream, ids, [np.array([-100, 9])], MASK, 7)
    with pytest.raises(IndexError, match="train_ids holds 6"):
        mask_baselines(stream, ids, [np.array([-100, 5])], MASK, 6)
