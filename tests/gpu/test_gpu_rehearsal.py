"""`make gpu` from its first line to its last, on a CPU with tiny shapes: its mistakes show without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from benchmarks.gpu import gpu

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.gpu.gpu"]


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    out = tmp_path / "gpu.json"
    command = [*COMMAND, "--rehearse", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["rehearsal"] is True
    assert report["parity"]["code"] == 0
    assert "passed" in report["parity"]["tail"]
    ops = {row["op"] for row in report["ops"]["rows"]}
    assert ops >= {"attention", "embed", "feed_forward", "mlm_loss", "qkv_proj", "layer_norm"}
    works = {row["work"]: row["milliseconds"] for row in report["models"]}
    assert works.keys() == {"training step", "inference B=1"}
    assert works["inference B=1"].keys() == {"fastbert", "fastbert, graph", "eager", "sdpa"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2
    assert "--rehearse" in capsys.readouterr().err
