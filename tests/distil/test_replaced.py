"""Labelled data of which other tokens take the place of some."""

import numpy as np
import pytest
import torch
from tiny_distil import distilled

from fastbert.distil.work import Replaced
from fastbert.finetune.features import Features, Shuffled

SPECIAL = [0, 1, 2]
SHARE = 0.25


@pytest.fixture
def batches():
    features = Features()
    for i in range(40):
        ids = [1, *range(100 * i + 3, 100 * i + 60), 2]
        features.add(ids, [0] * len(ids), i, labels=[i % 2])
    return Shuffled(features, 20, seed=0)


def test_a_share_is_replaced_by_tokens_of_the_batch(batches):
    plain, found = batches.batch(0, 1), Replaced(batches, SHARE, SPECIAL, seed=5).batch(0, 1)
    same = plain["input_ids"] == found["input_ids"]
    special = torch.isin(plain["input_ids"], torch.tensor(SPECIAL))
    assert same[special].all()
    assert 0.7 < same[~special].float().mean() < 0.8
    assert np.isin(found["input_ids"], plain["input_ids"]).all()
    assert not torch.isin(found["input_ids"][~special], torch.tensor(SPECIAL)).any()
    for key in plain.keys() - {"input_ids"}:
        assert np.array_equal(plain[key], found[key])
    # no sequence gives all of them
    rows = plain["cu_seqlens"][1]
    assert len({int(i) // 100 for i in found["input_ids"][:rows][~same[:rows]]}) > 5


def test_draws_depend_on_seed_epoch_and_number_alone(batches):
    def drawn(epoch, number, seed=5):
        return Replaced(batches, SHARE, SPECIAL, seed).batch(epoch, number)["input_ids"].tolist()

    assert drawn(1, 0) == drawn(1, 0)
    places = [
        {
            i
            for i, (a, b) in enumerate(zip(batches.batch(*at)["input_ids"], ids, strict=True))
            if a != b
        }
        for at, ids in (
            ((0, 0), drawn(0, 0)),
            ((0, 1), drawn(0, 1)),
            ((1, 0), drawn(1, 0)),
            ((0, 0), drawn(0, 0, seed=6)),
        )
    ]
    assert all(places[0] != other for other in places[1:])


def test_a_run_with_replaced_tokens(teachers, corpus, tmp_path):
    result = distilled(
        teachers, corpus, "labelled", tmp_path / "run", replaced=0.2, losses="soft,hidden"
    )
    assert result.student_test[result.metric] > 0.85
