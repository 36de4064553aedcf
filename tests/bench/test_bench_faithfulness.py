"""The benchmark of faithful attributions on tiny models, and its table."""

import json
import sys

import pytest
import tiny_tasks

from benchmarks.models import faithfulness
from benchmarks.models.int8_accuracy import Finetuned
from fastbert.finetune import finetune


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Tiny models in the place of MiniLM's."""
    base = tiny_tasks.base_model(tmp_path / "base")
    for work, task in (("movies", "classify"), ("entities", "tag")):
        rows = tiny_tasks.ROWS[task](80)
        data = tiny_tasks.write_jsonl(tmp_path / f"{task}.jsonl", rows)
        run = finetune(tiny_tasks.tiny_config(task, base), tmp_path / task, train=rows, quiet=True)
        one = Finetuned(run.model, data, None, data, "f1", "label")
        monkeypatch.setitem(faithfulness.WORKS, work, lambda runs, one=one: one)
    return tmp_path


@pytest.mark.slow
def test_every_method_is_judged_beside_random_orders(tiny, monkeypatch, capsys):
    out = tiny / "found.json"
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--out", str(out)])
    faithfulness.main()
    rows = json.loads(out.read_text())["rows"]
    assert rows.keys() == {"movies", "entities"}
    for row in rows.values():
        assert row["texts"] == 3
        assert len(row["random"]) == 2
        assert row["methods"].keys() == faithfulness.RUNS.keys()
        for found in row["methods"].values():
            assert {"comprehensiveness", "sufficiency", "area", "sanity"} == found.keys()
    printed = capsys.readouterr().out
    assert "| random orders |" in printed
    assert "| shap, removed |" in printed


def test_figures_better_than_every_random_order_are_bold():
    order = {"comprehensiveness": 0.2, "sufficiency": 0.3, "area": 0.1}
    found = {"comprehensiveness": 0.25, "sufficiency": 0.2, "area": 0.05, "sanity": 0.1}
    row = {"texts": 3, "date": "today", "random": [order], "methods": {"shap": found}}
    machine = {"cpu": "a cpu", "versions": {"fastbert": "0"}}
    text = faithfulness.table({"rows": {"movies": row}, "machine": machine})
    assert "| shap | **0.250** | **0.200** | 0.050 | 0.10 |" in text


def test_quick_figures_do_not_reach_the_page(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--quick"])
    with pytest.raises(SystemExit):
        faithfulness.arguments()
