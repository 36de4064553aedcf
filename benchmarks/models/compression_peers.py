"""Other engines on a dense fine-tuned model: their hidden states with the model's own head, and their times."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.models.bench_bert import starter
from benchmarks.models.summary import at_tokens
from benchmarks.models.works import padded
from benchmarks.peers.driver import Handle
from fastbert.data import Batch
from fastbert.finetune import Predictor
from fastbert.finetune.judge import Part
from fastbert.models.output import Output

# seconds for loading and converting, and for a call
LOAD, CALL = 900, 60
# {peer: what it computes in}
PRECISIONS = {
    "onnxruntime": "fp32",
    "onnxruntime-int8": "int8",
    "onnxruntime-int8-reduced": "int8",
    "ctranslate2-int8": "int8",
}


class Peers:
    """Workers that run the encoder of a model's folder on padded batches, each in its process; stopped between calls.

    `folder` keeps the converted models. A worker that can't do something raises WorkerError.
    """

    def __init__(self, model: Path, folder: Path, batches: Sequence[Batch]) -> None:
        self.folder, self.batches = folder, batches
        self.handles: dict[str, Handle] = {}
        # {peer: versions of its packages}
        self.versions: dict[str, dict[str, str]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model").exists():
            (folder / "model").symlink_to(model.resolve())

    def __enter__(self) -> Peers:
        self._stack = ExitStack()
        self.scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        for number, batch in enumerate(self.batches):
            rows = np.split(batch["input_ids"].numpy(), batch["cu_seqlens"][1:-1].numpy())
            np.savez(
                self.scratch / f"batch{number:04}.npz", **padded([row.tolist() for row in rows])
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, name: str) -> Callable[[int], float]:
        """Start a worker; returns a function of a batch's number that times a call, after one that is not counted."""
        handle = starter(self.scratch)(name)
        self._stack.callback(handle.close)
        job = {
            "kind": "infer",
            "precision": PRECISIONS[name],
            "folder": str(self.folder),
            "inputs": str(self.scratch),
            "threads": torch.get_num_threads(),
        }
        self.versions[name] = handle.ask(LOAD, "load", **job)["versions"]
        self.handles[name] = handle

        def seconds(number: int) -> float:
            return float(handle.ask(CALL, "time", batch=number, calls=1)["seconds"])

        return seconds

    @torch.no_grad()
    def metrics(self, name: str, predictor: Predictor, part: Part) -> dict[str, float]:
        """The metrics of a worker's hidden states with the predictor's head, on the batches' examples."""
        file, scores, task = self.scratch / f"{name}.npy", [], predictor.task
        for number, batch in enumerate(self.batches):
            self.handles[name].ask(LOAD, "check", file=str(file), batch=number)
            lengths = batch["cu_seqlens"].diff().numpy()
            real = np.arange(lengths.max()) < lengths[:, None]
            x = torch.from_numpy(at_tokens(np.load(file), real))
            scores += task.scores(Output(logits=logits(predictor.model, x, batch)), batch)
        predictions = task.predictions(part.examples, part.features, scores)
        return dict(task.metrics(part.examples, predictions))


def logits(model: Any, x: Tensor, batch: Batch) -> Tensor:
    """The head's output on hidden states (T, C): of every token, or of every sequence's first token."""
    if model.labels_per_token:
        return model.classifier(x)
    return model.classifier(model.bert.pool(x[batch["cu_seqlens"][:-1].long()]))
