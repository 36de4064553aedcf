"""`finetune`: from labelled data and a model to the model of the best step, its figures and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastbert.data.tokenizer import SpecialIds
from fastbert.files import quoted
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.data import Data, Sources, load_data
from fastbert.finetune.judge import Part
from fastbert.finetune.loop import FinetuneRun, FinetuneTrainer, judge, training_data
from fastbert.finetune.plot import plot_confusion, plot_curves
from fastbert.finetune.tag import seqeval
from fastbert.models.config import BertConfig
from fastbert.train import store
from fastbert.train.progress import duration
from fastbert.train.session import Session
from fastbert.train.settings import scheduled


@dataclass(frozen=True)
class Result:
    """The files of a finished run, and how good its model is."""

    out: Path
    # folder in Hugging Face's layout, of the best step
    model: Path
    steps: int
    seconds: float
    # what the best step was chosen by, and that step
    metric: str
    best_step: int
    # the best model's metrics
    validation: dict[str, float]
    test: dict[str, float] | None


def finetune(
    config: FinetuneConfig | None,
    out: str | Path,
    *,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    resume: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Fine-tune a model and write that of the best evaluation to OUT/model; with `resume` go on with the run in OUT.

    `train`, `validation` and `test` are data sets of `datasets` or lists of dicts, instead of the settings' files; a
    resumption is given the same again. Raises ValueError, TypeError or OSError before training for settings, data or
    folders that can't be used, loop.Stopped after SIGTERM or SIGINT, and TrainingError when training can't go on.
    """
    given = Sources(train, validation, test)
    check = partial(_check, given=given)
    session = Session(FinetuneConfig, config, out, resume=resume, quiet=quiet, say=say, check=check)
    with session as s:
        data = load_data(s.config, given)
        model = s.model(lambda: build_model(s.config, data))
        s.say(f"{type(model).__name__} from {s.config.model}: {data.describe()}")
        _check_metric(s.config, data)
        batches = training_data(data, s.config)
        about = {"examples": data.sizes(), "labels": data.task.names}
        s.begin(model, lambda: scheduled(s.config, len(batches)), about)
        run = FinetuneRun(FinetuneTrainer(model, batches, s.config), data, s)
        run.train()
        return _report(run)


def build_model(config: FinetuneConfig, data: Data) -> Any:
    """The model to start from, with a new head for the task's labels where the folder has none."""
    assert config.model is not None
    given: dict[str, Any] = {
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }
    given = {name: value for name, value in given.items() if value is not None}
    # of a head that another task may have had
    given |= {"problem_type": None, "id2label": None, "label2id": None, "num_labels": 2}
    if BertConfig.from_file(config.model).causal:
        # transformers looks for a text's last token before this one
        given["pad_token_id"] = SpecialIds.of(data.tokenizer).pad
    if names := data.task.names:
        given["num_labels"] = len(names)
        given["id2label"] = dict(enumerate(names))
        given["label2id"] = {name: i for i, name in enumerate(names)}
    try:
        return data.task.kind.from_pretrained(config.model, **given)
    except ValueError as error:
        if "pass num_labels=" not in str(error):
            raise
        raise ValueError(
            f"the model in {config.model} has a head for another number of labels than the data's {len(names)}: start "
            "from its encoder alone, BertModel.from_pretrained(...).save_pretrained(...) and the tokenizer"
        ) from error


def summary(result: Result) -> list[str]:
    """How good the best model is and where it is, in a few lines."""
    lines = [f"{result.steps} steps in {duration(result.seconds)}, best at {result.best_step}"]
    for name, values in (("validation", result.validation), ("test", result.test)):
        if values is not None:
            found = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if "_" not in k)
            lines.append(f"{name:<12} {found}")
    names = {"model": "model", "metrics": "metrics.jsonl", "pictures": "*.png"}
    return lines + [f"{name:<12} {result.out / file}" for name, file in names.items()]


def _report(run: FinetuneRun) -> Result:
    """Judge the saved model, loaded as users load it; write its figures and pictures."""
    out, folder, data, config = run.out, run.session.model_folder, run.data, run.config
    at = run.trainer.at
    model = data.task.kind.from_pretrained(folder).to(config.device)
    found: dict[str, dict[str, float]] = {}
    parts: dict[str, Part | None] = {"validation": data.validation, "test": data.test}
    for name, part in parts.items():
        if part is not None:
            found[name], predictions = judge(model, data, part, config)
            if (confused := data.task.confusion(part.examples, predictions)) is not None:
                title = f"{name} data, step {run.best['step']}"
                suffix = "" if name == "validation" else f"_{name}"
                names, matrix = confused
                plot_confusion(out / f"confusion{suffix}.png", names, matrix, title)
    best = run.best["step"]
    plot_curves(out / "metrics.jsonl", out / "curves.png", run.metric, best, str(config.task))
    result = Result(
        out,
        folder,
        at.step,
        at.seconds,
        run.metric,
        best,
        found["validation"],
        found.get("test"),
    )
    values = {"steps": at.step, "seconds": at.seconds, "metric": run.metric, "best_step": best}
    store.write_json(out / "result.json", {**values, **found})
    return result


def _check(config: FinetuneConfig, given: Sources) -> None:
    """The checks that need no data."""
    config.check_readable(has_data=given.train is not None)
    if config.task == "tag":
        # a missing package is an error now, not after an hour of training
        seqeval()


def _check_metric(config: FinetuneConfig, data: Data) -> None:
    metric = config.metric
    if config.task == "tag" and not data.task.entities and metric not in (None, "accuracy"):
        raise ValueError(
            f"metric is {quoted(metric)} and the tags mark no entities (such as B-PER): choose accuracy"
        )
