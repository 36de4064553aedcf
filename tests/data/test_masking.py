"""Masked-LM masks: their statistics over millions of tokens, whole words, and dependence on keys only."""

import numpy as np
import pytest

from fastbert.data import DataSettings, Masker, PretrainingData, SpecialIds, vocabulary

SIGMAS = 4


def epoch_of(data, epoch=0):
    """(original ids, masked ids, labels) of an epoch, end to end."""
    batches = list(data.batches(epoch, prefetch=0))
    masked = np.concatenate([b["input_ids"].numpy() for b in batches])
    labels = np.concatenate([b["labels"].numpy() for b in batches])
    return np.where(labels == -100, masked, labels), masked, labels


def near(count, trials, share):
    """Whether `count` of `trials` is a draw of probability `share`, to SIGMAS standard deviations."""
    return abs(count - trials * share) <= SIGMAS * np.sqrt(trials * share * (1 - share))


CASES = [("bert", False), ("bert", True), ("roberta", False), ("roberta", True)]


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=lambda case: f"{case[0]}-{'words' if case[1] else 'tokens'}",
)
def epoch(request):
    """An epoch of over 1 M tokens for each recipe with its own tokenizer."""
    recipe, whole_word = request.param
    bert = recipe == "bert"
    shards = request.getfixturevalue("shards" if bert else "bpe_shards")
    tokenizer = request.getfixturevalue("wordpiece" if bert else "bpe")
    settings = DataSettings(recipe=recipe, whole_word=whole_word, max_tokens=1 << 16, heldout=0.0)
    original, masked, labels = epoch_of(PretrainingData(shards, tokenizer, settings))
    assert len(original) > 1_000_000
    return tokenizer, whole_word, original, masked, labels


def test_fifteen_percent_are_predicted(epoch):
    tokenizer, whole_word, original, _, labels = epoch
    maskable = ~np.isin(original, SpecialIds.of(tokenizer).all)
    labelled = labels != -100
    assert not (labelled & ~maskable).any(), "special tokens are never predicted"
    trials = maskable.sum()
    # masking words of n tokens multiplies the variance by n at most; 1.6 is enough for both tokenizers
    spread = SIGMAS * np.sqrt(trials * 0.15 * 0.85 * (1.6 if whole_word else 1))
    assert abs(labelled.sum() - 0.15 * trials) <= spread


def test_of_these_eighty_ten_ten(epoch):
    tokenizer, _, original, masked, labels = epoch
    special = SpecialIds.of(tokenizer)
    labelled = labels != -100
    assert (masked[~labelled] == original[~labelled]).all()
    trials = labelled.sum()
    ordinary = len(vocabulary(tokenizer)) - len(special.all)
    hidden = labelled & (masked == special.mask)
    same = labelled & (masked == original)
    other = labelled & ~hidden & ~same
    assert near(hidden.sum(), trials, 0.8)
    # a random token is the original one with probability 1 / ordinary
    assert near(same.sum(), trials, 0.1 + 0.1 / ordinary)
    assert near(other.sum(), trials, 0.1 - 0.1 / ordinary)


def test_random_tokens_are_uniform_and_never_special(epoch):
    tokenizer, _, original, masked, labels = epoch
    special = SpecialIds.of(tokenizer)
    random = masked[(labels != -100) & (masked != special.mask) & (masked != original)]
    counts = np.bincount(random, minlength=len(vocabulary(tokenizer)))
    assert not counts[list(special.all)].any()
    counts = np.delete(counts, special.all)
    expected = len(random) / len(counts)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert expected > 3
    assert abs(chi2 - len(counts)) < 5 * np.sqrt(2 * len(counts))


def test_whole_words_stay_together(epoch):
    tokenizer, whole_word, original, _, labels = epoch
    tokens = np.array(vocabulary(tokenizer))
    special = np.isin(original, SpecialIds.of(tokenizer).all)
    if tokenizer.token_to_id("[CLS]") is not None:
        inner = np.char.startswith(tokens, "##")[original]
    else:
        inner = ~np.char.startswith(tokens, "Ġ")[original]
    # tokens that continue the word of the token before
    pieces = np.flatnonzero(inner[1:] & ~special[1:] & ~special[:-1]) + 1
    assert len(pieces) > 50_000
    labelled = labels != -100
    apart = (labelled[pieces] != labelled[pieces - 1]).mean()
    if whole_word:
        assert apart == 0
    else:
        # independent tokens differ with probability 2 * .15 * .85
        assert 0.24 < apart < 0.27


def test_every_sequence_has_its_share(wordpiece, shards):
    """The number of masks is prob * n, rounded up or down; there is no draw per token."""
    data = PretrainingData(shards, wordpiece, DataSettings(heldout=0.0))
    special = SpecialIds.of(wordpiece).all
    for batch in [data.batch(0, number) for number in range(0, 200, 10)]:
        ids = np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
        sequence = np.repeat(np.arange(len(batch.examples)), np.diff(batch["cu_seqlens"]))
        maskable = np.bincount(sequence[~np.isin(ids, special)])
        labelled = np.bincount(sequence[batch["label_rows"]], minlength=len(maskable))
        exact = 0.15 * maskable
        assert (labelled >= np.maximum(np.floor(exact), 1)).all()
        assert (labelled <= np.maximum(np.ceil(exact), 1)).all()


def example(tokenizer, lengths, seed=0):
    """Random ordinary tokens between [CLS] and [SEP]."""
    special = SpecialIds.of(tokenizer)
    ordinary = np.setdiff1d(np.arange(len(vocabulary(tokenizer))), special.all)
    rng = np.random.default_rng(seed)
    parts = [np.r_[special.cls, rng.choice(ordinary, n), special.sep] for n in lengths]
    return np.concatenate(parts), np.cumsum([0] + [len(part) for part in parts])


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_do_not_depend_on_the_batch(wordpiece, whole_word):
    masker = Masker(wordpiece, whole_word=whole_word)
    ids, bounds = example(wordpiece, [30, 1, 200, 7])
    keys = masker.keys(1, 2, np.array([5, 6, 7, 8]))
    together = masker(ids, bounds, keys)
    for number in range(4):
        part = slice(bounds[number], bounds[number + 1])
        alone = masker(ids[part], np.array([0, len(ids[part])]), keys[number : number + 1])
        assert alone.input_ids.tolist() == together.input_ids[part].tolist()
        assert alone.labels.tolist() == together.labels[part].tolist()
    assert together.label_rows.tolist() == np.flatnonzero(together.labels != -100).tolist()
    assert (np.diff(keys.astype(object)) != 0).all()
    for other in ((2, 2), (1, 3)):
        assert (
            masker(ids, bounds, masker.keys(*other, np.arange(5, 9))).labels != together.labels
        ).any()


def test_input_is_not_changed(wordpiece):
    masker = Masker(wordpiece)
    ids, bounds = example(wordpiece, [50])
    before = ids.copy()
    masker(ids, bounds, masker.keys(0, 0, np.arange(1)))
    assert (ids == before).all()


def test_short_and_empty_sequences(wordpiece):
    masker = Masker(wordpiece)
    ids, bounds = example(wordpiece, [1] * 100 + [0] * 3)
    masked = masker(ids, bounds, masker.keys(0, 0, np.arange(103)))
    # a sequence of one token has that token predicted
    assert masked.label_rows.tolist() == [1 + 3 * i for i in range(100)]
    empty = masker(ids[:0], np.array([0, 0]), masker.keys(0, 0, np.arange(1)))
    assert len(empty.input_ids) == len(empty.label_rows) == 0


def test_every_position_is_as_likely(wordpiece):
    """The first and the last position too, over 2 M tokens."""
    masker = Masker(wordpiece)
    ids, _ = example(wordpiece, [98])
    count = 20_000
    bounds = np.arange(count + 1) * 100
    masked = masker(np.tile(ids, count), bounds, masker.keys(0, 0, np.arange(count)))
    share = (masked.labels.reshape(count, 100) != -100).mean(0)
    assert share[0] == share[-1] == 0
    assert np.abs(share[1:-1] - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / count)
    # the choices of neighbours are uncorrelated, but for the fixed number in a sequence
    both = (masked.labels.reshape(count, 100)[:, 1:50] != -100).astype(float)
    correlation = np.corrcoef(both.T) - np.eye(49)
    assert np.abs(correlation + 1 / 97).max() < 6 / np.sqrt(count)


def test_bad_arguments_are_refused(wordpiece):
    for prob in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"mask_prob is .*: it must be above 0 and below 1"):
            Masker(wordpiece, prob)
    masker = Masker(wordpiece)
    with pytest.raises(
        IndexError, match="the ids go from 3 to 4000, the vocabulary from 0 to 3999"
    ):
        masker(np.array([3, 4000]), np.array([0, 2]), masker.keys(0, 0, np.arange(1)))
