"""Labelled data of which other tokens take the place of some."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_distil import distilled

from fastbert.distil import work
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


@pytest.mark.parametrize("ids", [[1, 2], [1, 7, 2], [1, *range(3, 40), 2]])
def test_a_batch_of_one_sequence_takes_its_own_tokens(ids):
    features = Features()
    features.add(ids, [0] * len(ids), 0, labels=[0])
    batch = Replaced(Shuffled(features, 4, seed=0), 0.5, SPECIAL, seed=0).batch(0, 0)
    found = batch["input_ids"].tolist()
    assert (found[0], found[-1]) == (1, 2)
    assert set(found) <= set(ids)
    assert (found == ids) == (len(ids) <= 3)


def test_special_tokens_stay_that_the_tokenizer_does_not_mark(
    teachers, corpus, tmp_path, monkeypatch
):
    teacher = shutil.copytree(teachers("classify"), tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = teacher / "model" / name
        kept = {k: v for k, v in json.loads(file.read_text()).items() if not k.endswith("_token")}
        file.write_text(json.dumps(kept | {"added_tokens": []}))
    seen = []

    class Seen(Replaced):
        def batch(self, epoch, number):
            seen.append((self.batches.batch(epoch, number), super().batch(epoch, number)))
            return seen[-1][1]

    monkeypatch.setattr(work, "Replaced", Seen)
    run = tmp_path / "run"
    distilled(lambda _: teacher, corpus, "labelled", run, replaced=0.5, losses="soft", steps=2)
    plain, found = (
        torch.cat([batch["input_ids"] for batch in part]) for part in zip(*seen, strict=True)
    )
    special = plain < 5
    assert special.sum() >= 2 * 2 * 16
    assert torch.equal(plain[special], found[special])
    assert 0.3 < (plain != found)[~special].float().mean() < 0.6


def test_a_run_with_replaced_tokens(teachers, corpus, tmp_path):
    result = distilled(
        teachers, corpus, "labelled", tmp_path / "run", replaced=0.2, losses="soft,hidden"
    )
    assert result.student_test[result.metric] > 0.85
