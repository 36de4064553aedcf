"""`pretrain`: from settings to a trained model in Hugging Face's layout, with its metrics, plot and checkpoints."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastbert.data import save_tokenizer
from fastbert.pretrain.build import build_model, check_model
from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.feed import Feed, prepare_feed, reopen_feed
from fastbert.pretrain.loop import PretrainRun
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train import session, store
from fastbert.train.plot import plot_losses
from fastbert.train.progress import duration
from fastbert.train.settings import FREE, check_length_said
from fastbert.train.trainer import TrainingError
from fastbert.train.world import World, joined

# the part of a time budget that is spent on finding out how many steps fit into it
_TIMED_PART = 0.05


@dataclass(frozen=True)
class Result:
    """What a run has made and what it has learned."""

    out: Path
    # folder in Hugging Face's layout, with its tokenizer
    model: Path
    plot: Path
    steps: int
    seconds: float
    # as `evaluate` returns it, after the last step
    evaluation: dict[str, float]
    # what simple predictors reach at the same held-out places
    baselines: dict[str, float]
    # whether this process is the one that reports
    main: bool = True


def pretrain(
    config: PretrainConfig | None,
    out: str | Path,
    *,
    resume: bool = False,
    rebuild: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Pretrain a BERT or RoBERTa and write it to OUT/model; with `resume` go on with the run in OUT.

    `config` may be None with `resume`. Raises ValueError, TypeError or OSError before training for settings, data or
    folders that can't be used, loop.Stopped after SIGTERM or SIGINT, and TrainingError when training can't go on.
    """
    out, say = Path(out), say or session.silent
    with joined(torch.cuda.is_available()) as world:
        say = say if world.main else session.silent
        config = _settled(_checked(config, out, resume))
        config, world = _divided(config, world, resume)
        # all have looked before one of them writes
        world.meet()
        alone = session.alone(out) if world.main else nullcontext()
        with alone, session.threads(config.threads), session.forced(config.backend):
            return _run(config, out, world, resume, rebuild, quiet, say)


def _divided(config: PretrainConfig, world: World, resume: bool) -> tuple[PretrainConfig, World]:
    """The settings and the world with the number of parts that a step's data has: as many for each process."""
    shards = (config.shards or 1) if resume else (config.shards or world.size)
    if shards % world.size:
        raise ValueError(
            f"the data of a step has {shards} parts and there are {world.size} processes: start a number that "
            "divides it, or a run with another number of shards"
        )
    return replace(config, shards=shards), replace(world, shards=shards, strategy=config.strategy)


def _run(
    config: PretrainConfig,
    out: Path,
    world: World,
    resume: bool,
    rebuild: bool,
    quiet: bool,
    say: Callable[[str], None],
) -> Result:
    """What a process does when it has met the others."""
    feed = _feed(config, out, world, resume, rebuild, quiet)
    session.seed_all(config.seed)
    assert config.device is not None
    device = world.device(config.device)
    if device.startswith("cuda:"):
        # libraries of several GPUs go by the current one
        torch.cuda.set_device(device)
    model = build_model(config, feed.tokenizer).to(device)
    # processes start from the same weights, and drop different things
    if world.rank:
        session.seed_all((config.seed + 1_000_003 * world.rank) % 2**63)
    if config.recompute:
        model.gradient_checkpointing_enable()
    say(_description(config, model, feed))
    if not resume:
        session.check_space(model, config, out)
        # timed steps are as many as on the slowest process
        config = replace(config, steps=int(world.most(_steps(config, model, feed, world))))
        if world.main:
            store.write_json(out / "about.json", session.about(config))
            # the last thing before training: a folder that has it holds a run
            store.write_text(out / "config.toml", config.to_toml())
    trainer = PretrainTrainer(model, feed.batches, config, world)
    run = PretrainRun(trainer, feed, out, _identity(config, feed), quiet)
    if resume:
        say(f"going on after step {run.resume()} of {config.steps}")
    return _report(run, feed, run.train())


def _feed(
    config: PretrainConfig, out: Path, world: World, resume: bool, rebuild: bool, quiet: bool
) -> Feed:
    """The data; one process makes what there is to be made, then the others open it."""
    if not world.main:
        world.meet()
        return reopen_feed(config, out, world)
    if resume:
        feed = reopen_feed(config, out, world, rebuild)
    else:
        feed = prepare_feed(config, out, world, quiet, rebuild)
    world.meet()
    return feed


def _report(run: PretrainRun, feed: Feed, evaluation: dict[str, float]) -> Result:
    """Write the model, the curve and the final figures."""
    trainer, out, world = run.trainer, run.out, run.world
    at, target, plot = trainer.at, out / "model", out / "loss.png"
    model = trainer.model
    if trainer.spread.sharded:
        weights = trainer.spread.whole()
        if world.main:
            model = type(model)(model.config)
            model.load_state_dict(weights)
    baselines = feed.baselines() if world.main else {}
    result = Result(out, target, plot, at.step, at.seconds, evaluation, baselines, world.main)
    if world.main:
        store.write_folder(target, lambda folder: _export(folder, model, feed))
        title = f"{getattr(trainer.config, 'recipe', '')} pretraining"
        plot_losses(out / "metrics.jsonl", plot, baselines, title)
        values = {"steps": at.step, "seconds": at.seconds, "held_out": evaluation}
        store.write_json(out / "result.json", {**values, "baselines": baselines})
    # whoever ends first must not be taken for lost
    world.meet()
    return result


def summary(result: Result) -> list[str]:
    """What a run has learned and where it is, in a few lines."""
    held = result.evaluation
    lines = [
        f"{result.steps} steps in {duration(result.seconds)}",
        f"held out, where the input is [MASK]: loss {held['mlm_loss_masked']:.3f} nats, "
        f"accuracy {held['accuracy_masked']:.1%}",
    ]
    lines += [
        f"  {name} at the same places: {value:.3f} nats" for name, value in result.baselines.items()
    ]
    if "nsp_accuracy" in held:
        low, high = held["nsp_low"], held["nsp_high"]
        lines.append(
            f"next sentence: {held['nsp_accuracy']:.1%} right (95 %: {low:.1%} to {high:.1%})"
        )
    names = {
        "model": result.model,
        "loss curve": result.plot,
        "metrics": result.out / "metrics.jsonl",
        "TensorBoard": result.out / "tensorboard",
        "settings": result.out / "config.toml",
    }
    return lines + [f"{name:<12} {path}" for name, path in names.items()]


def _export(folder: Path, model: Any, feed: Feed) -> None:
    model.save_pretrained(folder)
    save_tokenizer(feed.tokenizer, folder)


def _checked(config: PretrainConfig | None, out: Path, resume: bool) -> PretrainConfig:
    """The run's settings, after the checks that need no data."""
    if resume:
        return resumed(out, {} if config is None else config.to_dict())
    if config is None:
        raise TypeError("config is None: only a run that is resumed has its settings in OUT")
    session.fresh(out)
    if not config.sources:
        raise ValueError("sources is empty: name the text to train on, or - for standard input")
    for source in config.sources:
        if source != "-" and Path(source).resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(
                f"--out {out} lies inside the source {source}, whose files are all read: move it"
            )
    check_length_said(config.to_dict())
    check_model(config)
    session.writable(out)
    return config


def resumed(out: Path, given: Mapping[str, Any]) -> PretrainConfig:
    """The recorded settings of the run in `out`, with the given ones that change no loss.

    Raises FileNotFoundError where there is no run, and ValueError, naming what differs, for any other difference.
    """
    given = dict(given)
    if given.get("sources") is not None:
        given["sources"] = _absolute(given["sources"])
    return session.recorded(out, given, PretrainConfig)


def _settled(config: PretrainConfig) -> PretrainConfig:
    return replace(session.settled(config), sources=_absolute(config.sources))


def _absolute(sources: Sequence[str]) -> list[str]:
    return [s if s == "-" else str(Path(s).absolute()) for s in sources]


def _identity(config: PretrainConfig, feed: Feed) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    settings = {k: v for k, v in config.to_dict().items() if k not in FREE}
    return {
        **settings,
        **feed.identity(),
        "the backend of each op": session.backends(config.device or "cpu"),
    }


def _steps(config: PretrainConfig, model: torch.nn.Module, feed: Feed, world: World) -> int:
    """The number of optimiser steps that the settings ask for."""
    if config.steps is not None:
        return config.steps
    if config.epochs is not None:
        whole, part = int(config.epochs), config.epochs % 1.0
        batches = sum(feed.train.num_batches(epoch) for epoch in range(whole))
        batches += round(part * feed.train.num_batches(whole)) if part else 0
        return max(batches // config.accumulate, 1)
    assert config.minutes is not None
    return max(round(60.0 * config.minutes / seconds_per_step(model, feed, config, world)), 1)


def seconds_per_step(
    model: torch.nn.Module, feed: Feed, config: PretrainConfig, world: World
) -> float:
    """Time some steps on a copy of the model; the model and the generators are left as they were.

    Several processes time their own work without exchanging gradients.
    """
    assert config.minutes is not None
    rng = store.capture_rng()
    alone, settings = World(shards=len(world.parts)), replace(config, steps=1_000_000)
    trial = PretrainTrainer(copy.deepcopy(model), feed.batches, settings, alone)
    # the first step is slower than the rest: memory, imports
    trial.train_step()
    started, steps, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < _TIMED_PART * 60.0 * config.minutes:
        trial.train_step()
        steps, elapsed = steps + 1, time.perf_counter() - started
    store.restore_rng(rng)
    return elapsed / steps


def _description(config: PretrainConfig, model: Any, feed: Feed) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    sizes = model.config
    return (
        f"{type(model).__name__} with {millions:.1f} M parameters: {sizes.num_hidden_layers} layers x "
        f"{sizes.hidden_size}, vocabulary {sizes.vocab_size}; {feed.describe()}; {config.precision} on "
        f"{config.device}, {config.threads} threads"
    )


__all__ = ["Result", "TrainingError", "pretrain"]
