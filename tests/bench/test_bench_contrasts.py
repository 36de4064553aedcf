"""The contrasts on tiny models: parts are kept, sizes are equal, the copy task asks for the first token."""

import json
import sys

import torch

from benchmarks.models import contrasts


def test_parts_are_kept_and_the_page_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(contrasts, "DISTANCES", (2, 4))
    monkeypatch.setattr(contrasts, "LENGTHS", (8, 16))
    page, out = contrasts.PAGE.read_text(), tmp_path / "contrasts.json"
    given = ["x", "--quick", "--steps", "2", "--rates", "1e-3", "--out", str(out)]
    for part in contrasts.PARTS:
        monkeypatch.setattr(sys, "argv", [*given, "--parts", part])
        contrasts.main()
    found = json.loads(out.read_text())
    assert found["costs"]["ratios"]["training"]["BERT"] == 1.0
    assert found["copy"]["BiLSTM"]["accuracy"].keys() == {"2", "4"}
    assert "after d tokens" in contrasts.report(found)
    monkeypatch.setattr(contrasts, "costs", None)
    contrasts.main()
    assert contrasts.PAGE.read_text() == page


def test_models_have_one_size_within_5_percent():
    for sizes, vocabulary in ((contrasts.SIZES, 8000), (contrasts.SMALL, contrasts.SYMBOLS + 1)):
        counts = [
            sum(p.numel() for p in contrasts.encoder(kind, sizes, vocabulary).parameters())
            for kind in contrasts.FORMS.values()
        ]
        assert max(counts) < 1.05 * min(counts)


def test_the_question_is_the_first_token():
    ids, wanted = contrasts.copies(5, 3, torch.Generator().manual_seed(0))
    assert ids.shape == (3, 7)
    assert torch.equal(ids[:, 0], wanted)
    assert (ids[:, -1] == contrasts.ASKED).all()
