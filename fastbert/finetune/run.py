"""`finetune`: from labelled data and a model to the model of the best step, its figures and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.data import Data, Sources, load_data
from fastbert.finetune.judge import Part
from fastbert.finetune.loop import FinetuneRun, FinetuneTrainer, judge, training_data
from fastbert.finetune.plot import plot_confusion, plot_curves
from fastbert.finetune.tag import seqeval
from fastbert.models.config import BertConfig
from fastbert.train import session, store
from fastbert.train.progress import duration
from fastbert.train.settings import FREE


@dataclass(frozen=True)
class Result:
    """What a run has made and how good it is."""

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
    out, say = Path(out), say or session.silent
    given = Sources(train, validation, test)
    config = _settled(_checked(config, out, resume, given))
    with session.alone(out), session.threads(config.threads), session.forced(config.backend):
        data = load_data(config, given)
        session.seed_all(config.seed)
        model = build_model(config, data).to(config.device)
        if config.recompute:
            model.gradient_checkpointing_enable()
        say(f"{type(model).__name__} from {config.model}: {data.describe()}")
        _check_metric(config, data)
        batches = training_data(data, config)
        if not resume:
            session.check_space(model, config, out)
            config = _scheduled(config, len(batches))
            about = {**session.about(config), "examples": data.sizes(), "labels": data.task.names}
            store.write_json(out / "about.json", about)
            # the last thing before training: a folder that has it holds a run
            store.write_text(out / "config.toml", config.to_toml())
        trainer = FinetuneTrainer(model, batches, config)
        run = FinetuneRun(trainer, data, out, _identity(config, data), config, quiet)
        if resume:
            say(f"going on after step {run.resume()} of {config.steps}")
        run.train()
        return _report(run)


def build_model(config: FinetuneConfig, data: Data) -> Any:
    """The model to start from, with a head for the task's labels where it has none of them."""
    assert config.model is not None
    given: dict[str, Any] = {
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if names := data.task.names:
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
    """Judge the model that was saved, as everybody will load it; write its figures and pictures."""
    out, data, config, at = run.out, run.data, run.settings, run.trainer.at
    model = data.task.kind.from_pretrained(out / "model").to(config.device)
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
        out / "model",
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


def _checked(
    config: FinetuneConfig | None, out: Path, resume: bool, given: Sources
) -> FinetuneConfig:
    """The run's settings, after the checks that need no data."""
    if resume:
        return resumed(out, {} if config is None else config.to_dict())
    if config is None:
        raise TypeError("config is None: only a run that is resumed has its settings in OUT")
    session.fresh(out)
    for name, remedy in (
        ("task", "choose classify, tag or answer"),
        ("model", "name the folder of the model to start from"),
    ):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is not said: {remedy}")
    if given.train is None and not config.sources:
        raise ValueError(
            "sources is empty: name the file of the training data (in Python: or pass train=)"
        )
    assert config.model is not None
    assert config.max_length is not None
    if config.task == "tag":
        # asked for now, and not after an hour of training
        seqeval()
    base = BertConfig.from_file(config.model)
    if config.max_length > base.max_length:
        raise ValueError(
            f"max_length is {config.max_length} and the model in {config.model} has {base.max_length} positions: "
            "lower max_length"
        )
    session.writable(out)
    return config


def resumed(out: Path, given: Mapping[str, Any]) -> FinetuneConfig:
    """The settings of the run in `out`, as session.recorded has them."""
    # 0 leaves these to the run, which has recorded what it came to
    open_ = ("eval_every", "checkpoint_every")
    given = {name: value for name, value in given.items() if value or name not in open_}
    return session.recorded(out, _absolute(given), FinetuneConfig)


def _settled(config: FinetuneConfig) -> FinetuneConfig:
    config = session.settled(config)
    return replace(config, **_absolute({n: getattr(config, n) for n in (*_PATHS, "sources")}))


_PATHS = ("validation", "test", "model")


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with whole paths, which a resumption from elsewhere finds too."""
    found = dict(given)
    for name in _PATHS:
        if found.get(name) is not None:
            found[name] = str(Path(found[name]).absolute())
    if found.get("sources") is not None:
        found["sources"] = [str(Path(s).absolute()) for s in found["sources"]]
    return found


def _scheduled(config: FinetuneConfig, batches: int) -> FinetuneConfig:
    """The settings with the number of steps, and an evaluation and a checkpoint an epoch where nothing else is said."""
    steps = config.steps
    if steps is None:
        assert config.epochs is not None
        steps = max(math.ceil(config.epochs * batches / config.accumulate), 1)
    epoch = max(round(batches / config.accumulate), 1)
    return replace(
        config,
        steps=steps,
        eval_every=config.eval_every or epoch,
        checkpoint_every=config.checkpoint_every or epoch,
    )


def _check_metric(config: FinetuneConfig, data: Data) -> None:
    metric = config.metric
    if config.task == "tag" and not data.task.entities and metric not in (None, "accuracy"):
        raise ValueError(
            f"metric is {metric!r} and the tags mark no entities (such as B-PER): choose accuracy"
        )


def _identity(config: FinetuneConfig, data: Data) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    settings = {k: v for k, v in config.to_dict().items() if k not in FREE}
    kernels = session.backends(config.device or "cpu")
    return {**settings, **data.identity(), "the backend of each op": kernels}
