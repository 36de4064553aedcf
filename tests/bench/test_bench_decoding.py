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
    assert all(row in decoding.table(found) for row in decoding.ROWS)


def test_other_tokens_are_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(
        decoding.fastbert, "generate", lambda m, p, n: [decoding.torch.zeros(n).long() for _ in p]
    )
    with pytest.raises(AssertionError, match="other tokens"):
        decoding.measured("decoding, 1 text", True, 1, tmp_path)
