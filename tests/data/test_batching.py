"""Batches: their contents, order, resuming, ranks and speed, and their settings."""

import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch

from fastbert.data import (
    DataSettings,
    PretrainingData,
    ShardsError,
    SpecialIds,
    build_shards,
    pad_batch,
)

FORMS = {
    "bucketed": {"batch_size": 32},
    "packed": {"max_tokens": 4096},
    "roberta": {"recipe": "roberta", "batch_size": 24},
}


def equal(a, b):
    """Whether two batches are bitwise the same."""
    same = a.keys() == b.keys() and a.identity == b.identity and a["max_seqlen"] == b["max_seqlen"]
    return same and all(torch.equal(a[k], b[k]) for k in a if k != "max_seqlen")


@pytest.fixture(params=FORMS)
def data(request, shards, wordpiece):
    return PretrainingData(shards, wordpiece, DataSettings(seed=5, **FORMS[request.param]))


def sequences(batch):
    """{number of an example: its tensors as lists}."""
    nexts = batch.get("next_sentence_label", [None] * len(batch.examples))
    bounds = batch["cu_seqlens"].tolist()
    found = {}
    for number, start, end, label in zip(batch.examples, bounds, bounds[1:], nexts, strict=False):
        columns = ("input_ids", "token_type_ids", "labels")
        found[number] = (
            *(batch[c][start:end].tolist() for c in columns),
            None if label is None else int(label),
        )
    return found


def test_shapes_dtypes_and_layout(data, shards, wordpiece):
    special = SpecialIds.of(wordpiece)
    bert = data.settings.recipe == "bert"
    for number in (0, len(data.plan(0)) // 2, len(data.plan(0)) - 1):
        batch = data.batch(0, number)
        tokens, count = int(batch["cu_seqlens"][-1]), len(batch.examples)
        assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items() if k != "max_seqlen"} == {
            "input_ids": (torch.int64, (tokens,)),
            "token_type_ids": (torch.int64, (tokens,)),
            "cu_seqlens": (torch.int32, (count + 1,)),
            "labels": (torch.int64, (tokens,)),
            "label_rows": (torch.int64, (len(batch["label_rows"]),)),
            **({"next_sentence_label": (torch.int64, (count,))} if bert else {}),
        }
        assert type(batch["max_seqlen"]) is int
        assert batch["max_seqlen"] == batch["cu_seqlens"].diff().max() <= 128
        assert torch.equal(batch["label_rows"], (batch["labels"] != -100).nonzero()[:, 0])
        for ids, types, labels, _ in sequences(batch).values():
            ids = np.where(np.array(labels) == -100, ids, labels)
            separators = np.flatnonzero(ids == special.sep)
            assert ids[0] == special.cls
            assert separators[-1] == len(ids) - 1
            assert (ids == special.cls).sum() == 1
            if bert:
                assert len(separators) == 2
                assert types == [0] * (separators[0] + 1) + [1] * (len(ids) - separators[0] - 1)
            else:
                assert not any(types)


def test_tokens_are_those_of_the_documents(shards, wordpiece):
    """The tokens of every piece are those in the shards at the place in the plan."""
    data = PretrainingData(shards, wordpiece, DataSettings())
    batch, plan = data.batch(2, 7), data.plan(2)
    sep = SpecialIds.of(wordpiece).sep
    for number, (ids, _, labels, label) in sequences(batch).items():
        original = [i if t == -100 else t for i, t in zip(ids, labels, strict=True)]
        middle = original.index(sep)
        pieces = original[1:middle], original[middle + 1 : -1]
        for place, piece in enumerate(pieces):
            start, end = (
                plan.examples.starts[2 * number + place],
                plan.examples.ends[2 * number + place],
            )
            assert shards.tokens[start:end].tolist() == piece
        assert plan.examples.labels[number] == label


def test_every_example_comes_once_and_fits(data):
    seen = [number for batch in data.batches(prefetch=0) for number in batch.examples]
    assert sorted(seen) == list(range(len(data.plan(0).examples)))
    assert seen != sorted(seen)
    settings = data.settings
    for batch in data.batches(prefetch=0):
        if settings.max_tokens:
            assert len(batch["input_ids"]) <= settings.max_tokens
        else:
            assert len(batch.examples) <= settings.batch_size
    assert data.num_tokens() == sum(len(b["input_ids"]) for b in data.batches(prefetch=0))


def test_buckets_waste_little_and_packing_fills(shards, wordpiece):
    bucketed = PretrainingData(shards, wordpiece, DataSettings(recipe="roberta"))
    padded = sum(len(b.examples) * b["max_seqlen"] for b in bucketed.batches(prefetch=0))
    assert bucketed.num_tokens() / padded > 0.97
    packed = PretrainingData(shards, wordpiece, DataSettings(max_tokens=4096))
    assert packed.num_tokens() / (4096 * packed.num_batches()) > 0.97
    # lengths are mixed over the epoch, without a curriculum
    lengths = np.array([b["max_seqlen"] for b in bucketed.batches(prefetch=0)])
    half = len(lengths) // 2
    assert abs(lengths[:half].mean() - lengths[half:].mean()) < 5


def test_forms_agree_on_every_example(shards, wordpiece):
    bucketed = PretrainingData(shards, wordpiece, DataSettings(batch_size=32))
    packed = PretrainingData(shards, wordpiece, DataSettings(max_tokens=2048))
    first, second = {}, {}
    for batch in bucketed.batches(1, prefetch=0):
        first |= sequences(batch)
    for batch in islice(packed.batches(1, prefetch=0), 100):
        second |= sequences(batch)
    assert len(second) > 1000
    assert all(first[number] == sequence for number, sequence in second.items())


def test_padded_form_is_the_packed_form(data, wordpiece):
    pad = SpecialIds.of(wordpiece).pad
    for number in range(3):
        batch = data.batch(0, number)
        padded = pad_batch(batch, pad, multiple_of=8)
        shape = (len(batch.examples), -(-batch["max_seqlen"] // 8) * 8)
        mask = padded["attention_mask"].bool()
        assert mask.sum(1).tolist() == batch["cu_seqlens"].diff().tolist()
        assert (mask == mask.sort(1, descending=True).values).all(), "padding is on the right"
        for name, fill in (("input_ids", pad), ("token_type_ids", 0), ("labels", -100)):
            assert padded[name].shape == shape
            assert torch.equal(padded[name][mask], batch[name])
            assert (padded[name][~mask] == fill).all()
        assert padded.identity == batch.identity
        assert ("next_sentence_label" in padded) == ("next_sentence_label" in batch)


def test_resuming_anywhere_gives_the_same_batches(data, shards, wordpiece):
    count = data.num_batches(0)
    whole = list(islice(data.stream(), count + 30))
    assert [(b.epoch, b.number) for b in whole[count - 1 : count + 1]] == [(0, count - 1), (1, 0)]
    for position in (0, 17, count - 1, count, count + 9):
        epoch, number = divmod(position, count)
        fresh = PretrainingData(shards, wordpiece, data.settings)
        for prefetch in (0, 3):
            resumed = list(islice(fresh.stream(epoch, number, prefetch=prefetch), 5))
            expected = whole[position : position + 5]
            assert all(equal(a, b) for a, b in zip(resumed, expected, strict=True))
    # after an epoch's last batch the next epoch begins
    assert equal(next(data.stream(0, count)), whole[count])


def test_epochs_and_seeds_differ(data, shards, wordpiece):
    other = DataSettings(**(vars(data.settings) | {"seed": 6}))
    assert not equal(data.batch(0, 0), data.batch(1, 0))
    assert data.plan(0).examples.starts.tolist() != data.plan(1).examples.starts.tolist()
    assert not torch.equal(
        data.batch(0, 0)["cu_seqlens"],
        PretrainingData(shards, wordpiece, other).batch(0, 0)["input_ids"],
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_disjoint_and_even(form, world_size, shards, wordpiece):
    settings = DataSettings(seed=5, **FORMS[form])
    ranks = [
        PretrainingData(shards, wordpiece, settings, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(rank.plan(0)) for rank in ranks}) == 1
    members = [set(rank.plan(0).members.tolist()) for rank in ranks]
    union = set().union(*members)
    assert len(union) == sum(len(m) for m in members)
    total = len(ranks[0].plan(0).examples)
    # fewer examples than one step of all ranks are left out
    step = world_size * np.diff(ranks[0].plan(0).bounds).max()
    assert total - step < len(union) <= total
    # an example does not depend on its rank
    alone = PretrainingData(shards, wordpiece, settings)
    everything = {}
    for batch in alone.batches(prefetch=0):
        everything |= sequences(batch)
    for rank in ranks:
        batch = rank.batch(0, 3)
        assert all(everything[n] == s for n, s in sequences(batch).items())
    if form == "bucketed":
        widths = [[rank.batch(0, n)["max_seqlen"] for rank in ranks] for n in range(50)]
        assert np.ptp(widths, axis=1).mean() < 4, "no rank waits for a longer batch"


def test_heldout_part_is_fixed_and_apart(shards, wordpiece):
    train, heldout = (
        PretrainingData(shards, wordpiece, DataSettings(seed=1), part=part)
        for part in ("train", "heldout")
    )
    assert not set(train.documents) & set(heldout.documents)
    assert len(train.documents) + len(heldout.documents) == 125
    starts = shards.sentences[shards.documents]
    for data in (train, heldout):
        examples = data.plan(0).examples
        owners = np.searchsorted(starts, examples.starts, side="right") - 1
        assert set(owners) <= set(data.documents)
    # pairs and masks do not depend on the epoch and the training seed
    other = PretrainingData(shards, wordpiece, DataSettings(seed=2), part="heldout")
    for number in range(heldout.num_batches()):
        first = heldout.batch(0, number)
        for again in (heldout.batch(3, number), other.batch(0, number)):
            assert all(
                torch.equal(first[k], again[k])
                for k in ("input_ids", "labels", "next_sentence_label")
            )
    moved = PretrainingData(shards, wordpiece, DataSettings(split_seed=1), part="heldout")
    assert set(moved.documents) != set(heldout.documents)
    assert abs(heldout.plan(0).examples.labels.mean() - 0.5) < 0.005


def test_prefetching_stops_with_its_consumer(data):
    def workers():
        return [t for t in threading.enumerate() if t.name == "fastbert-data"]

    before = len(workers())
    batches = data.stream(prefetch=2)
    next(batches)
    assert len(workers()) == before + 1
    batches.close()
    assert len(workers()) == before
    assert len(list(data.batches(start=data.num_batches() - 3))) == 3
    assert len(workers()) == before


def test_errors_of_the_prefetching_thread_arrive(data, monkeypatch):
    real = data.batch

    def batch(epoch, number):
        if number == 2:
            raise OSError("the disk is gone")
        return real(epoch, number)

    monkeypatch.setattr(data, "batch", batch)
    batches = data.batches()
    assert [next(batches).number, next(batches).number] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_batch_costs_a_few_milliseconds(shards, wordpiece):
    """A batch of 32 x 128 tokens; the least of many times, since the machine may be busy (0.7 ms on 2 EPYC cores)."""
    data = PretrainingData(shards, wordpiece, DataSettings(batch_size=32, max_length=128))
    times = []
    for number in range(data.num_batches() // 2):
        start = time.perf_counter()
        data.batch(0, number)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005


def test_identity_names_the_batch(data):
    batch = data.batch(1, 4)
    assert batch.identity.startswith("epoch 1, batch 4, examples ")
    assert batch.identity.endswith(f"{batch.examples[-2]}, {batch.examples[-1]}")
    assert batch.to("cpu").identity == batch.identity
    assert dict(**batch).keys() == batch.keys()


BAD_SETTINGS = {
    "recipe is 'elmo': choose bert, roberta or gpt": {"recipe": "elmo"},
    "max_length is 7: it must be at least 8": {"max_length": 7},
    r"short_seq_prob is 1.5: it must be within \[0, 1\]": {"short_seq_prob": 1.5},
    "mask_prob is 0: it must be above 0 and below 1": {"mask_prob": 0},
    "batch_size is 0: it must be at least 1": {"batch_size": 0},
    "max_tokens is 100: a batch must hold one sequence of max_length 128": {"max_tokens": 100},
    r"heldout is 1.0: it must be within \[0, 1\)": {"heldout": 1.0},
    "seed is -1: it must not be negative": {"seed": -1},
    "split_seed is -2: it must not be negative": {"split_seed": -2},
}


@pytest.mark.parametrize("sentence", BAD_SETTINGS)
def test_bad_settings_are_refused(sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        DataSettings(**BAD_SETTINGS[sentence])


def test_bad_arguments_are_refused(shards, wordpiece, bpe, small, tmp_path):
    settings = DataSettings()
    with pytest.raises(ValueError, match="part is 'test': choose train or heldout"):
        PretrainingData(shards, wordpiece, settings, part="test")
    with pytest.raises(ValueError, match=r"rank is 2 of 2: it must be within \[0, world_size\)"):
        PretrainingData(shards, wordpiece, settings, rank=2, world_size=2)
    with pytest.raises(
        ShardsError, match="was made with another tokenizer: load that one or rebuild it"
    ):
        PretrainingData(shards, bpe, settings)
    with pytest.raises(ValueError, match="no document is held out: set heldout above 0"):
        PretrainingData(shards, wordpiece, DataSettings(heldout=0.0), part="heldout")
    data = PretrainingData(shards, wordpiece, settings)
    count = data.num_batches()
    with pytest.raises(
        IndexError, match=f"batch {count} is outside epoch 0, which has {count} batches"
    ):
        data.batch(0, count)
    with pytest.raises(IndexError, match=f"batch {count + 1} is outside epoch 0, which has"):
        data.batches(0, count + 1)
    with pytest.raises(IndexError, match="epoch is -1: it must not be negative"):
        data.batch(-1, 0)
    (tmp_path / "a.txt").write_text("The dog. A cat.\n##\nThe house. A dog.")
    two = build_shards(tmp_path / "a.txt", small, tmp_path / "out", separator="##")
    few = PretrainingData(two, small, DataSettings(heldout=0.0), world_size=4)
    with pytest.raises(
        ValueError, match="2 examples don't fill one batch on each of 4 ranks: add text"
    ):
        few.num_batches()


def test_two_small_documents_are_enough(small, tmp_path):
    (tmp_path / "a.txt").write_text("The dog. A cat.\n##\nThe house. A dog.")
    shards = build_shards(tmp_path / "a.txt", small, tmp_path / "out", separator="##")
    for settings in (DataSettings(heldout=0.0), DataSettings(heldout=0.0, max_tokens=128)):
        (batch,) = PretrainingData(shards, small, settings).batches()
        assert sorted(batch["next_sentence_label"].tolist()) == [0, 1]
