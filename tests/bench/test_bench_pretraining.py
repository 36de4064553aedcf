"""The benchmark of recipes on tiny models: it runs, goes on where it ended, writes its table; no time is read."""

import json
import shutil
import sys

import pytest
import tiny_run

from benchmarks.models import equal_time, pretraining
from benchmarks.models.pretraining import ARMS, NEW, OLD


@pytest.mark.slow
def test_recipes_are_compared_and_runs_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(equal_time, "peaks", lambda seconds: {"fma_gflops_fp32": 1.0})
    monkeypatch.setattr(pretraining, "POINTS", 3)
    texts = tiny_run.write_corpus(tmp_path / "texts", documents=20)
    out, runs = tmp_path / "out.json", tmp_path / "runs"
    arguments = [
        "--quick",
        "--minutes",
        "0.001",
        "--seeds",
        "1",
        "--rates",
        "1e-3",
        "--threads",
        "1",
    ]
    arguments += ["--texts", str(texts), "--runs", str(runs), "--out", str(out)]
    arms = ["--arms", OLD, NEW, "biases"]
    page = pretraining.PAGE.read_text()
    monkeypatch.setattr(sys, "argv", ["x", *arguments, *arms])
    pretraining.main()
    found = json.loads(out.read_text())
    (run,) = pretraining.runs_of(found, NEW, 0.001)
    points = run["points"]
    assert len(points) >= 3
    assert [p["minutes"] for p in points] == sorted(p["minutes"] for p in points)
    # both are judged at the same places
    assert all(3.0 < p[name] < 8.0 for p in points for name in ("full", "pairs"))
    assert {run["arm"] for run in found["runs"].values()} == {OLD, NEW, "biases"}
    text = pretraining.report(found)
    assert "| biases |" in text
    assert f"goal {pretraining.GOAL}" in text
    pretraining.draw(found, tmp_path / "plot.png")
    assert pretraining.PAGE.read_text() == page
    # nothing is trained twice, in a checkout without the folders of the runs either
    shutil.rmtree(runs)
    monkeypatch.setattr(equal_time, "pretrain", lambda *_, **__: pytest.fail("trained again"))
    pretraining.main()
    assert json.loads(out.read_text())["runs"] == found["runs"]


def test_every_arm_is_a_configuration(tmp_path):
    options = type(
        "Options", (), {"quick": False, "texts": tmp_path, "runs": tmp_path, "threads": 1}
    )
    configs = {arm: pretraining.settings(arm, options, steps=10) for arm in ARMS}
    assert len({str(c.to_dict()) for c in configs.values()}) == len(ARMS)
    # the changes are changes of one setting, or of one with what belongs to it
    base = configs[NEW].to_dict()
    for arm in ARMS:
        changed = {k for k, v in configs[arm].to_dict().items() if v != base[k]}
        assert arm in (OLD, NEW) or 1 <= len(changed) <= 2, (arm, changed)
