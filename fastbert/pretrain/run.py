"""`pretrain`: from settings to a trained model in Hugging Face's layout, with its metrics, plot and checkpoints."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastbert.models.two_towers import TwoTowers
from fastbert.pretrain.build import as_loaded, build_model, check_usable
from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.evaluate import judged_loss
from fastbert.pretrain.feed import Feed, shared_feed
from fastbert.pretrain.image_feed import ImageFeed, shared_image_feed
from fastbert.pretrain.image_run import ImageRun, ImageTrainer, build_image_model, shown
from fastbert.pretrain.loop import PretrainRun, reached
from fastbert.pretrain.recipes import OF_IMAGES
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train import store
from fastbert.train.plot import plot_losses, plot_recalls
from fastbert.train.progress import duration
from fastbert.train.session import Session
from fastbert.train.trainer import TrainingError
from fastbert.train.world import World

# the part of a time budget that is spent on finding out how many steps fit into it, and the most seconds of that
_TIMED_PART, _TIMED_SECONDS = 0.05, 10.0


@dataclass(frozen=True)
class Result:
    """The files of a finished run, and how good its model is."""

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
    # the held-out loss that was to end the run
    goal: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the last evaluation has reached the goal; False without one."""
        return reached(self.evaluation, self.goal)


def pretrain(
    config: PretrainConfig | None,
    out: str | Path,
    *,
    resume: bool = False,
    rebuild: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Pretrain a model of one of the recipes and write it to OUT/model; with `resume` go on with the run in OUT.

    `config` may be None with `resume`. Raises ValueError, TypeError or OSError before training for settings, data or
    folders that can't be used, loop.Stopped after SIGTERM or SIGINT, and TrainingError when training can't go on.
    """
    check = partial(check_usable, out=Path(out))
    session = Session(PretrainConfig, config, out, resume=resume, quiet=quiet, say=say, check=check)
    with session as s:
        feed: Feed | ImageFeed
        if s.config.recipe in OF_IMAGES:
            if rebuild:
                raise ValueError("rebuild is set and the run reads images, not text: leave it out")
            feed = shared_image_feed(s.config, s.out, s.world, resume=s.resume)
        else:
            feed = shared_feed(
                s.config, s.out, s.world, resume=s.resume, rebuild=rebuild, quiet=s.quiet
            )
        kind = _kind(s.config)
        model = s.model(lambda: kind.build(s.config, feed.tokenizer))
        s.say(_description(s.config, model, feed))
        s.begin(model, lambda: _scheduled(s.config, model, feed, s.world))
        run = kind.run(kind.trainer(model, feed.batches, s.config, s.world), feed, s)
        return _report(s, run, run.train())


class _Kind(NamedTuple):
    """What a run on text, or one on images, is made of."""

    build: Callable[..., Any]
    trainer: Callable[..., Any]
    run: Callable[..., Any]
    draw: Callable[..., None]


def _kind(config: PretrainConfig) -> _Kind:
    if config.recipe in OF_IMAGES:
        return _Kind(build_image_model, ImageTrainer, ImageRun, plot_recalls)
    return _Kind(build_model, PretrainTrainer, PretrainRun, plot_losses)


def _report(s: Session[PretrainConfig], run: Any, evaluation: dict[str, float]) -> Result:
    """Write the model, the curve and the final figures."""
    at, plot, main = run.trainer.at, s.out / "loss.png", s.world.main
    s.export(run.trainer.spread.whole(), run.feed.tokenizer)
    baselines = run.feed.baselines() if main else {}
    if main:
        title = f"{s.config.recipe} pretraining"
        _kind(s.config).draw(s.out / "metrics.jsonl", plot, baselines, title)
        values = {"steps": at.step, "seconds": at.seconds, "held_out": evaluation}
        store.write_json(s.out / "result.json", {**values, "baselines": baselines})
    figures = (at.step, at.seconds, evaluation, baselines)
    return Result(s.out, s.model_folder, plot, *figures, main=main, goal=run.goal)


def summary(result: Result) -> list[str]:
    """How good the model is and where it is, in a few lines."""
    held = result.evaluation
    lines = [f"{result.steps} steps in {duration(result.seconds)}"]
    lines += _judged_words(result) if "text_to_image_r1" not in held else _judged_images(result)
    names = {
        "model": result.model,
        "loss curve": result.plot,
        "metrics": result.out / "metrics.jsonl",
        "TensorBoard": result.out / "tensorboard",
        "settings": result.out / "config.toml",
    }
    # TensorBoard's folder is there if the package is installed
    return lines + [f"{name:<12} {path}" for name, path in names.items() if path.exists()]


def _judged_images(result: Result) -> list[str]:
    chance = ", ".join(f"{name} {value:.1%}" for name, value in result.baselines.items())
    return [f"held out, {line}" for line in shown(result.evaluation)] + [f"  {chance}"]


def _judged_words(result: Result) -> list[str]:
    held = result.evaluation
    lines = [
        f"held out, {'next words' if 'lm_loss' in held else 'where the input is [MASK]'}: loss "
        f"{judged_loss(held):.3f} nats, accuracy {held.get('accuracy_masked', held['accuracy']):.1%}",
    ]
    if result.goal is not None:
        state = "reached" if result.reached else "not reached"
        lines.append(f"  the goal at the same places: {result.goal:.3f} nats, {state}")
    lines += [
        f"  {name} at the same places: {value:.3f} nats" for name, value in result.baselines.items()
    ]
    if "nsp_accuracy" in held:
        low, high = held["nsp_low"], held["nsp_high"]
        lines.append(
            f"next sentence: {held['nsp_accuracy']:.1%} right (95 %: {low:.1%} to {high:.1%})"
        )
    return lines


def _scheduled(
    config: PretrainConfig, model: torch.nn.Module, feed: Feed | ImageFeed, world: World
) -> PretrainConfig:
    """The settings that are recorded: with the number of steps, where they are timed that of the slowest process."""
    found = as_loaded(config, model.config)  # type: ignore[arg-type]
    return replace(found, steps=int(world.most(_steps(config, model, feed, world))))


def _steps(
    config: PretrainConfig, model: torch.nn.Module, feed: Feed | ImageFeed, world: World
) -> int:
    """The number of optimiser steps that follows from the settings."""
    if config.steps is not None:
        return config.steps
    if config.epochs is not None:
        whole, part = int(config.epochs), config.epochs % 1.0
        batches = sum(feed.train.num_batches(epoch) for epoch in range(whole))
        batches += round(part * feed.train.num_batches(whole)) if part else 0
        return max(int(batches / config.batches_a_step), 1)
    assert config.minutes is not None
    seconds = seconds_per_step(model, feed, config, world)
    seconds *= config.batches_a_step / config.accumulate
    return max(round(60.0 * config.minutes / seconds), 1)


def seconds_per_step(
    model: torch.nn.Module, feed: Feed | ImageFeed, config: PretrainConfig, world: World
) -> float:
    """Time some steps of all batches on a copy of the model; the model and the generators are left as they were.

    Several processes time their own work without exchanging gradients.
    """
    assert config.minutes is not None
    rng = store.capture_rng()
    single = World(shards=len(world.parts))
    settings = replace(config, steps=1_000_000, batch_ramp=0.0)
    trial = _kind(config).trainer(copy.deepcopy(model), feed.batches, settings, single)
    # the first step is slower than the rest: memory, imports
    trial.train_step()
    started, steps, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < min(_TIMED_PART * 60.0 * config.minutes, _TIMED_SECONDS):
        trial.train_step()
        steps, elapsed = steps + 1, time.perf_counter() - started
    store.restore_rng(rng)
    return elapsed / steps


def _description(config: PretrainConfig, model: Any, feed: Feed | ImageFeed) -> str:
    c, millions = model.config, sum(p.numel() for p in model.parameters()) / 1e6
    if isinstance(model, TwoTowers):
        sizes = (
            f"texts {c.text.num_hidden_layers} layers x {c.text.hidden_size}, images {c.image.num_hidden_layers} x "
            f"{c.image.hidden_size}, vectors of {c.projection_dim}, vocabulary {c.text.vocab_size}"
        )
    else:
        sizes = f"{c.num_hidden_layers} layers x {c.hidden_size}, vocabulary {c.vocab_size}"
    return (
        f"{type(model).__name__} with {millions:.1f} M parameters: {sizes}; {feed.describe()}; {config.precision} on "
        f"{config.device}, {config.threads} threads"
    )


__all__ = ["Result", "TrainingError", "pretrain"]
