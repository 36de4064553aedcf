"""The benchmark of decoding on small models: it runs, agrees, writes its table; no time is read."""

import json
import sys

import pytest

pytest.importorskip("transformers", minversion="5.0")

from benchmarks.models import decoding


def test_rows_are_kept_and_the_page_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding, "peaks", lambda seconds: {"fma_gflops_fp32": 1.0})
    monkeypatch.setattr(decoding, "NEW", 2)
    page, out = decoding.PAGE.read_text(), tmp_path / "decoding.json"
    for row in decoding.ROWS:
        monkeypatch.setattr(sys, "argv", ["x", "--quick", "--rows", row, "--out", str(out)])
        assert decoding.main() == 0
    found = json.loads(out.read_text())
    assert list(found["rows"]) == [*decoding.ROWS]
    assert ["share" in row for row in found["rows"].values()] == [True, True, False, False]
    assert decoding.PAGE.read_text() == page
    table = decoding.table(found)
    assert all(row in table for row in decoding.ROWS)
    assert table.count("2 rounds") == 1
    # a row that is not measured again keeps its date; files of the first form have one for all rows
    rows = found["rows"]
    one = rows["decoding, 1 text"]
    machine = {**one.pop("machine"), "date": "2020-01-02"}
    old = {"rows": {"decoding, 1 text": one}, "machine": machine, "peaks": one.pop("peaks")}
    out.write_text(json.dumps({**old, "transformers": "5.0"}))
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--rows", decoding.STEP, "--out", str(out)])
    assert decoding.main() == 0
    found = json.loads(out.read_text())
    dates = [row["machine"]["date"] for row in found["rows"].values()]
    assert dates == ["2020-01-02", decoding.machine_info()["date"]]
    table = " ".join(decoding.table(found).split())
    assert "decoding, 1 text: 2020-01-02, " in table
    assert "training step, 41 % real tokens: " + dates[1] in table


def test_other_tokens_are_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(
        decoding.fastbert, "generate", lambda m, p, n: [decoding.torch.zeros(n).long() for _ in p]
    )
    with pytest.raises(AssertionError, match="other tokens"):
        decoding.measured("decoding, 1 text", True, 1, tmp_path)
