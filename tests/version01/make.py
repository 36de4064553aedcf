"""Made the files in this folder, with version 0.1 (commit d9e984b): `python tests/version01/make.py FOLDER`.

run.tar.gz: a pretraining that was stopped after 9 of 12 steps. metrics.jsonl: of the same run, not stopped.
models.pt: pickled models, a batch for each, and their outputs.
"""

import contextlib
import io
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_run
import transformers

import fastbert
from fastbert.bert import BertConfig, BertForPreTraining
from fastbert.train import PretrainConfig, pretrain
from fastbert.train.loop import Stopped
from fastbert.train.trainer import Trainer

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}


def make_run(folder: Path) -> None:
    """Write the files of two runs; SIGTERM stops one in its ninth step, after whose end it writes a checkpoint."""
    corpus = tiny_run.write_corpus(folder / "corpus")
    text = "\n\n".join(p.read_text() for p in sorted(corpus.glob("*.txt")))
    settings = tiny_run.tiny_settings("-", hidden=16, heads=2, layers=1, separator="")
    for name in ("whole", "run"):
        sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
        if name == "run":
            step = Trainer.train_step

            def stopped(trainer, step=step):
                if trainer.at.step == 8:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(trainer)

            Trainer.train_step = stopped
        with contextlib.suppress(Stopped):
            pretrain(PretrainConfig(**settings), folder / name, quiet=True)
    shutil.copy(folder / "whole" / "metrics.jsonl", folder / "metrics.jsonl")
    shutil.rmtree(folder / "run" / "tensorboard")
    for old in sorted((folder / "run" / "checkpoints").iterdir())[:-1]:
        old.unlink()
    with tarfile.open(folder / "run.tar.gz", "w:gz") as archive:
        archive.add(folder / "run", "run")


def make_models(folder: Path) -> None:
    """Write models as users pickle them: accelerated ones of transformers and of torch.nn, our own, frozen ones."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ids = torch.randint(5, 60, (3, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 6])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    models = {
        "accelerated": (fastbert.accelerate(transformers.BertForMaskedLM(config)), batch),
        "frozen": (fastbert.freeze(fastbert.accelerate(transformers.BertModel(config))), batch),
        "own": (BertForPreTraining(BertConfig(**SIZES)), batch),
        "own, frozen": (fastbert.freeze(BertForPreTraining(BertConfig(**SIZES))), batch),
        "torch.nn": (fastbert.accelerate(encoder), {"src": torch.randn(2, 5, 16)}),
    }
    saved = {}
    for name, (model, given) in models.items():
        with torch.no_grad():
            found = model.eval()(**given)
        values = [found] if isinstance(found, torch.Tensor) else list(found.to_tuple())
        saved[name] = {"model": model, "batch": given, "outputs": values}
    torch.save(saved, folder / "models.pt")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    make_run(target)
    make_models(target)
