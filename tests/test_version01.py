"""Files of version 0.1 still work: a run is resumed, pickled models are loaded (tests/version01/make.py)."""

import tarfile
from pathlib import Path

import pytest
import torch

import fastbert
from fastbert.pretrain import pretrain
from fastbert.train.metrics import read_metrics

FOLDER = Path(__file__).with_name("version01")
LOSSES = ("loss", "mlm_loss", "nsp_loss", "grad_norm", "mlm_loss_masked", "accuracy_masked")


def test_a_run_is_resumed(tmp_path):
    """It ends with the losses of the run that was not stopped: the same batches, masks, dropout and schedule."""
    with tarfile.open(FOLDER / "run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    pretrain(None, tmp_path / "run", resume=True, quiet=True)
    found = read_metrics(tmp_path / "run" / "metrics.jsonl")
    expected = read_metrics(FOLDER / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in found] == [
        (line["kind"], line["step"]) for line in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & set(LOSSES):
            # on other chips and versions of torch sums differ in their last digits
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)


@pytest.mark.parametrize("name", ["accelerated", "frozen", "own", "own, frozen", "torch.nn"])
def test_a_pickled_model_is_loaded(name):
    pytest.importorskip("transformers", minversion="5")
    saved = torch.load(FOLDER / "models.pt", weights_only=False)[name]
    model = saved["model"].eval()
    batch = saved["batch"]
    if "attention_mask" in batch:
        # the archive has zeros at padding; ids that are not padding's are computed there now
        batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    with torch.no_grad():
        found = model(**batch)
    values = [found] if isinstance(found, torch.Tensor) else list(found.to_tuple())
    for ours, theirs in zip(values, saved["outputs"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (fastbert.frozen_bytes(model) > 0) == ("frozen" in name)
