"""The benchmark of the newer encoders on models of two layers: it runs, agrees, writes its table; no time is read."""

import json
import sys

import pytest

pytest.importorskip("transformers", minversion="5.0")

from benchmarks.models import families
from benchmarks.report import readme

ESM = "ESM-2 35M, inference"
INT8 = "MPNet-base, inference, int8"
VILT = "ViLT-base, mixed sizes, inference"


@pytest.fixture
def small(monkeypatch):
    """Makes a run a matter of a second."""
    monkeypatch.setattr(families, "LENGTHS", (16, 5))
    monkeypatch.setattr(families, "LONG", 512)
    monkeypatch.setattr(families, "IMAGES", ((64, 96), (32, 32)))
    monkeypatch.setattr(families, "TEXTS", (5, 9))
    monkeypatch.setattr(families, "peaks", lambda seconds: {"fma_gflops_fp32": 1.0})


def test_rows_are_kept_and_the_page_is_left_alone(small, monkeypatch, tmp_path):
    page, out = families.PAGE.read_text(), tmp_path / "families.json"
    for row in (ESM, INT8, VILT, families.WINDOW):
        monkeypatch.setattr(sys, "argv", ["x", "--quick", "--rows", row, "--out", str(out)])
        assert families.main() == 0
    found = json.loads(out.read_text())
    assert list(found["rows"]) == [ESM, INT8, VILT, families.WINDOW]
    assert all(row["ratio"]["median"] > 0 for row in found["rows"].values())
    assert found["rows"][ESM]["error"] < 1e-4 < found["rows"][INT8]["error"] < 5e-2
    assert families.PAGE.read_text() == page
    assert ESM in families.table(found)


def test_a_model_that_runs_transformers_code_is_not_timed(small, monkeypatch):
    monkeypatch.setitem(families.ESM, "position_embedding_type", "relative_key")
    with pytest.raises(AssertionError, match="transformers' own code ran"):
        families.measured(ESM, True, 1)


def test_a_page_keeps_what_stands_behind_its_table():
    begin, end = families.BEGIN, families.END
    page = f"a {begin}\nold\n{end} b {end} c"
    assert readme.replaced(page, "new", begin, end) == f"a {begin}\nnew\n{end} b {end} c"
