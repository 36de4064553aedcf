"""Files that are written whole or not at all, and the lines that a resumption keeps."""

import errno
import json

import pytest
import torch

from fastbert import files
from fastbert.train import store
from fastbert.train.metrics import Metrics, read_metrics
from fastbert.train.plot import plot_losses


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_keeps_the_last(tmp_path):
    checkpoints = store.Checkpoints(tmp_path, keep=2)
    for step in (5, 9, 10, 100):
        checkpoints.save(step, {"step": step})
    assert names(tmp_path) == ["step-00000010.pt", "step-00000100.pt"]
    assert checkpoints.load() == {"step": 100}


def test_nothing_there(tmp_path):
    assert store.Checkpoints(tmp_path / "none", keep=1).load() is None


def test_damaged_checkpoint_is_named(tmp_path):
    checkpoints = store.Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"x": torch.arange(1000)})
    path = checkpoints.save(2, {"x": torch.arange(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"step-00000002\.pt is damaged .*: delete it to resume"):
        checkpoints.load()


def test_failed_write_keeps_what_is_there(tmp_path, monkeypatch):
    """A full disk while torch writes, which hides the system's error: no temporary file is left."""
    checkpoints = store.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"step": 1})

    def full(state, file):
        file.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="can't be written: PytorchStreamWriter"):
        checkpoints.save(2, {})
    assert names(tmp_path) == ["step-00000001.pt"]


def test_full_disk(tmp_path, monkeypatch):
    """A full disk that shows when the file is put on it: the system's own error."""

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write_text(tmp_path / "a", "text")
    assert names(tmp_path) == []


def test_unfinished_files_are_removed(tmp_path):
    (tmp_path / ".unfinished-abc").write_bytes(b"half a checkpoint")
    (tmp_path / ".unfinished-dir").mkdir()
    (tmp_path / "kept").write_text("")
    store.remove_unfinished(tmp_path)
    assert names(tmp_path) == ["kept"]


def test_folder_is_whole_or_absent(tmp_path):
    def fails(folder):
        (folder / "a").write_text("new")
        raise RuntimeError("half way")

    store.write_folder(tmp_path / "f", lambda folder: (folder / "a").write_text("old"))
    with pytest.raises(RuntimeError, match="half way"):
        store.write_folder(tmp_path / "f", fails)
    assert (tmp_path / "f" / "a").read_text() == "old"
    store.write_folder(tmp_path / "f", lambda folder: (folder / "b").write_text("new"))
    assert names(tmp_path / "f") == ["b"]
    assert names(tmp_path) == ["f"]


def test_metrics_drop_what_comes_after_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write("train", 1, {"loss": 1 / 3})
    size = metrics.sync()
    # written after the checkpoint of step 1: the resumed run writes this line again
    metrics.write("eval", 1, {"loss": 0.5})
    metrics.write("train", 2, {"loss": 2 / 3})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    again = Metrics(tmp_path, 1, size)
    again.write("train", 2, {"loss": 7.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1 / 3), (2, 7.0)]


def test_half_a_line_is_no_line(tmp_path):
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path / "m") == [{"step": 1}]


def test_plot_is_a_png(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write("train", 1, {"mlm_loss": 2.0})
    metrics.write("eval", 1, {"mlm_loss_masked": 2.5})
    metrics.close()
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", {"unigram": 6.0}, "test")
    from PIL import Image

    image = Image.open(tmp_path / "loss.png")
    assert image.format == "PNG"
    # lines and a legend have many colours
    assert len(image.convert("RGB").getcolors(1 << 20)) > 10
