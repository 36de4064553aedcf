"""The benchmark of what explanations cost: its gate, its tables, and a small measurement of memory."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.models import explaining

MACHINE = {"cpu": "a cpu", "threads": 2, "versions": {"fastbert": "0"}}


def test_tables_show_ratios_and_goals():
    spread = {"median": 2.0, "p20": 1.9, "p80": 2.1}
    integrated = {
        "texts": 4,
        "tokens": [5, 9.4, 12],
        "date": "today",
        "error": {"median": 1e-4, "most": 2e-3},
        "ratio": {explaining.ALONE: spread},
    }
    of = {"plain": {"peak": 100, "added": 10}, "maps": {"peak": 110, "added": 15}}
    rows = {
        "integrated": integrated,
        "maps": {"date": "today", "shapes": [{"B": 8, "S": 128, **of}]},
    }
    text = explaining.table({"rows": rows, "machine": MACHINE})
    assert "| captum, text by text | 2.00 (1.90 to 2.10) | **missed** |" in text
    assert "| 8 x 128 | 1.10 | met | 1.50 |" in text


def test_scores_that_differ_are_not_timed():
    ours = [torch.tensor([1.0, 2.0])]
    explaining.agree({explaining.OURS: ours, explaining.ALONE: [ours[0] * 1.0001]})
    with pytest.raises(ValueError, match="captum, text by text disagrees with us on text 0"):
        explaining.agree({explaining.OURS: ours, explaining.ALONE: [ours[0] * 1.01]})


def test_without_captum_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ValueError, match="run make bench-explaining"):
        explaining.Captum(tmp_path, 1)


@pytest.mark.slow
def test_memory_of_a_fresh_process(monkeypatch):
    monkeypatch.setattr(explaining, "SHAPES", ((1, 16),))
    row = explaining.maps(SimpleNamespace())
    (at,) = row["shapes"]
    for name in ("plain", "maps"):
        assert at[name]["peak"] > at[name]["added"] >= 0
