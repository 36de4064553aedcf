"""The tokens of examples: NSP pairs and full sentences, on real speeches."""

import numpy as np
import pytest

from fastbert.data import build_shards, full_sentences, sentence_pairs
from fastbert.data import pairs as module

LENGTH = 128


def document_of(shards, tokens):
    """The document of each token's number."""
    return np.searchsorted(shards.sentences[shards.documents], tokens, side="right") - 1


@pytest.fixture(scope="module")
def pairs(shards, everything):
    return sentence_pairs(shards, everything, max_length=LENGTH, seed=1)


def sides(examples):
    """(E, 2) starts and ends of A and B."""
    return examples.starts.reshape(-1, 2), examples.ends.reshape(-1, 2)


@pytest.mark.parametrize("length", [16, 128, 512])
@pytest.mark.parametrize("epoch", [0, 1])
def test_half_of_the_pairs_are_random_and_never_of_one_document(shards, everything, length, epoch):
    examples = sentence_pairs(shards, everything, max_length=length, epoch=epoch)
    assert len(examples) > 2000
    assert abs(examples.labels.mean() - 0.5) <= 0.005
    starts, ends = sides(examples)
    first, last = document_of(shards, starts), document_of(shards, ends - 1)
    assert (first == last).all(), "a piece never leaves its document"
    same = first[:, 0] == first[:, 1]
    assert (same == (examples.labels == 0)).all()


def test_pairs_fit_and_hold_something(pairs, shards):
    lengths = pairs.lengths()
    assert lengths.max() == LENGTH
    assert (pairs.ends > pairs.starts).all()
    # 90 % have the full length as target; some of the rest reach it with a long sentence
    assert 0.90 < (lengths == LENGTH).mean() < 0.95
    assert 0.04 < (lengths < LENGTH * 0.75).mean() < 0.12


def test_next_pairs_are_adjacent_and_uncut_pieces_are_whole_sentences(pairs, shards):
    starts, ends = sides(pairs)
    uncut = pairs.lengths() < LENGTH
    assert uncut.sum() > 500
    edges = np.concatenate([starts[uncut].ravel(), ends[uncut].ravel()])
    assert np.isin(edges, shards.sentences).all()
    following = pairs.labels == 0
    assert (starts[following, 1] >= ends[following, 0]).all()
    both = uncut & following
    assert (starts[both, 1] == ends[both, 0]).all()


def test_pairs_cover_the_documents_once(pairs, shards, everything):
    """Sentences that a random B replaces are used again, so that all A and all true B follow without overlap."""
    starts, ends = sides(pairs)
    following = pairs.labels == 0
    begin, end = starts[:, 0], np.where(following, ends[:, 1], ends[:, 0])
    assert (begin[1:] >= end[:-1]).all()
    # the rest was truncated, or is the single last sentence of a document
    assert (end - begin).sum() > 0.75 * len(shards.tokens)
    whole = sentence_pairs(shards, everything, max_length=100_000, short_seq_prob=0.0)
    starts, ends = sides(whole)
    end = np.where(whole.labels == 0, ends[:, 1], ends[:, 0])
    gaps = starts[1:, 0] - end[:-1]
    sentences = np.searchsorted(shards.sentences, starts[1:, 0]) - np.searchsorted(
        shards.sentences, end[:-1]
    )
    assert set(sentences[gaps > 0]) <= {1}, "at most a single sentence is left at a document's end"


def test_random_pieces_come_from_everywhere(pairs, shards, everything):
    starts, _ = sides(pairs)
    random = pairs.labels == 1
    counts = np.bincount(document_of(shards, starts[random, 1]), minlength=len(everything))
    expected = random.sum() / len(everything)
    assert counts.min() > 0
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # 4 standard deviations of chi-squared with 124 degrees of freedom
    assert chi2 < 124 + 4 * np.sqrt(2 * 124)


def test_single_sentences_do_not_bias_the_halves(small, tmp_path):
    """Half of the documents have one sentence, the others two or three. Labels depend on the coin only."""
    sentences = ["The dog runs.", "A cat walks.", "The old house."]
    documents = [" ".join(sentences[: 1 + (i % 4 > 1) + (i % 4 > 2)]) for i in range(400)]
    (tmp_path / "a.txt").write_text("\n##\n".join(documents))
    shards = build_shards(tmp_path / "a.txt", small, tmp_path / "out", separator="##")
    assert np.bincount(np.diff(shards.documents)).tolist() == [0, 200, 100, 100]
    for length in (8, 64):
        examples = sentence_pairs(shards, np.arange(400), max_length=length)
        assert len(examples) >= 200
        assert abs(examples.labels.mean() - 0.5) <= 0.005
        starts, _ = sides(examples)
        owners = document_of(shards, starts)
        assert ((owners[:, 0] == owners[:, 1]) == (examples.labels == 0)).all()
        # no pair begins in a document of one sentence
        sizes = np.diff(shards.documents)[owners[:, 0]]
        assert sizes.min() == 2


def test_blocks_make_the_same_examples(pairs, shards, everything, monkeypatch):
    """Small blocks give about as many pairs, with balanced labels, that also begin at the blocks' first documents."""
    monkeypatch.setattr(module, "_BLOCK", 10_000)
    examples = sentence_pairs(shards, everything, max_length=LENGTH, seed=1)
    assert abs(examples.labels.mean() - 0.5) <= 0.005
    assert abs(len(examples) - len(pairs)) < 0.02 * len(pairs)
    starts, _ = sides(examples)
    edges = [b.start for b in module._blocks(shards, everything)]
    assert len(edges) == 4
    first_of_block = shards.sentences[shards.documents[edges]]
    assert np.isin(first_of_block, starts[:, 0]).mean() > 0.5


@pytest.mark.parametrize("make", [sentence_pairs, full_sentences])
def test_examples_are_a_function_of_seed_and_epoch(make, shards, everything):
    def same(a, b):
        return a.starts.shape == b.starts.shape and (a.starts == b.starts).all()

    first = make(shards, everything, max_length=LENGTH, seed=3, epoch=4)
    assert same(first, make(shards, everything, max_length=LENGTH, seed=3, epoch=4))
    assert not same(first, make(shards, everything, max_length=LENGTH, seed=3, epoch=5))
    assert not same(first, make(shards, everything, max_length=LENGTH, seed=4, epoch=4))


def slow_truncation(a, b, budget):
    """The lengths after truncation as BERT does it, one token at a time from the longer side."""
    while a + b > budget:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    return a, b


def test_truncation_takes_from_the_longer():
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 60, 500), rng.integers(1, 60, 500)
    begin = rng.integers(0, 9, 500)
    front = rng.random(500), rng.random(500)
    starts, ends = module._truncate((begin, begin + a), (begin + 100, begin + 100 + b), 50, *front)
    found = (ends - starts).reshape(-1, 2)
    assert found.tolist() == [list(slow_truncation(*ab, 50)) for ab in zip(a, b, strict=True)]
    starts, ends = starts.reshape(-1, 2), ends.reshape(-1, 2)
    assert (starts[:, 0] >= begin).all()
    assert (ends[:, 0] <= begin + a).all()
    cut = found[:, 0] < a
    share = ((starts[:, 0] - begin) / np.maximum(a - found[:, 0], 1))[cut]
    assert 0.4 < share.mean() < 0.6, "front and back alike"


def test_full_sentences_hold_every_token_once(shards, everything):
    examples = full_sentences(shards, everything, max_length=LENGTH)
    taken = module.ranges(examples.starts, examples.ends)
    assert len(taken) == len(shards.tokens)
    assert (np.sort(taken) == np.arange(len(taken))).all()
    lengths = examples.lengths()
    assert lengths.max() <= LENGTH
    pieces = np.diff(examples.offsets)
    assert pieces.sum() - len(pieces) > 100, "almost every document's end is crossed"
    assert (document_of(shards, examples.starts) == document_of(shards, examples.ends - 1)).all()
    assert examples.labels is None
    # an example is full: its next sentence would not fit
    sizes = np.diff(shards.sentences)
    after = examples.starts[examples.offsets[1:-1]]
    following = sizes[np.searchsorted(shards.sentences, after, side="right") - 1]
    assert (lengths[:-1] + np.minimum(following, LENGTH - 2) + 1 >= LENGTH).all()


def test_full_sentences_are_whole_unless_too_long(shards, everything):
    examples = full_sentences(shards, everything, max_length=LENGTH)
    inside = ~np.isin(examples.starts, shards.sentences)
    sentence = np.searchsorted(shards.sentences, examples.starts[inside], side="right") - 1
    assert (np.diff(shards.sentences)[sentence] > LENGTH - 2).all()
    assert 0 < inside.sum() < 0.05 * len(examples)


def test_too_little_text_is_refused(small, tmp_path):
    (tmp_path / "a.txt").write_text("The dog.\n##\nA cat.")
    one = build_shards(tmp_path / "a.txt", small, tmp_path / "one")
    with pytest.raises(
        ValueError, match="needs at least 2 documents, there are 1: add some, say what"
    ):
        sentence_pairs(one, np.arange(1), max_length=64)
    two = build_shards(tmp_path / "a.txt", small, tmp_path / "two", separator="##")
    with pytest.raises(
        ValueError, match="no document has two sentences to make a pair of: use recipe rob"
    ):
        sentence_pairs(two, np.arange(2), max_length=64)
    with pytest.raises(ValueError, match="there is no document to make examples of"):
        full_sentences(two, np.arange(0), max_length=64)
    assert len(full_sentences(two, np.arange(2), max_length=64)) == 1
