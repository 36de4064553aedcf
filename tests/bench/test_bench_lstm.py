"""The benchmark of fastbert.nn.LSTM on a few short sequences: it runs, agrees, writes its table; no time is read."""

import json
import sys

import pytest
import torch

from benchmarks.models import lstm

SMALL = {
    "both directions": {
        "input_size": 5,
        "hidden_size": 4,
        "num_layers": 2,
        "bidirectional": True,
    },
    "one direction": {"input_size": 3, "hidden_size": 6},
}


@pytest.fixture
def small(monkeypatch):
    """Makes a run a matter of a second."""
    monkeypatch.setattr(lstm, "ROWS", SMALL)
    monkeypatch.setattr(lstm, "peaks", lambda seconds: {"fma_gflops_fp32": 1.0})


def test_rows_are_kept_and_the_page_is_left_alone(small, monkeypatch, tmp_path):
    page, out = lstm.PAGE.read_text(), tmp_path / "lstm.json"
    for row in SMALL:
        monkeypatch.setattr(sys, "argv", ["x", "--quick", "--rows", row, "--out", str(out)])
        assert lstm.main() == 0
    found = json.loads(out.read_text())
    assert list(found["rows"]) == list(SMALL)
    for row in found["rows"].values():
        assert row["error"] < 1e-4
        assert row["per_token"]["1"]["median"] == pytest.approx(1.0)
        assert set(row["ratios"]) == {lstm.ON_SEQUENCE, lstm.SEQUENCE, lstm.PADDED}
    assert lstm.PAGE.read_text() == page
    assert "one direction" in lstm.table(found)


def test_wrong_gradients_are_not_timed(small, monkeypatch):
    right = lstm.steps

    def wrong(*args):
        calls = right(*args)
        ours = calls[lstm.OURS]
        calls[lstm.OURS] = lambda: [t * (1 + 1e-3 * (i == 2)) for i, t in enumerate(ours())]
        return calls

    monkeypatch.setattr(lstm, "steps", wrong)
    with pytest.raises(AssertionError, match="not timed"):
        lstm.measured(SMALL["one direction"], (4, 2), 1)


def test_operations_are_counted():
    """Of the products of a layer: x W_ih^T and h W_hh^T, and twice as many in backward."""
    assert lstm.flops(SMALL["one direction"], 10) == 3 * 2 * 10 * 24 * (3 + 6)
    assert lstm.flops(SMALL["both directions"], 1) == 3 * 2 * 2 * 16 * ((5 + 4) + (8 + 4))
    assert torch.nn.LSTM(3, 6).weight_ih_l0.shape == (24, 3)
