"""A whole run: when to log, to evaluate, to write a checkpoint and to stop, so that a resumption leaves no trace."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fastbert.files import quoted
from fastbert.train import store
from fastbert.train.metrics import Metrics
from fastbert.train.progress import Progress
from fastbert.train.session import BACKENDS, Session
from fastbert.train.sharded import ShardedCheckpoints
from fastbert.train.trainer import StepResult, Trainer, TrainingError

_log = logging.getLogger("fastbert")


class Stopped(Exception):
    """A signal ended the run after a whole step; a checkpoint of that step is written."""

    def __init__(self, signum: int, step: int, out: Path, command: str) -> None:
        self.exit_code = 128 + signum
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; go on with: "
            f"fastbert {command} --out {out} --resume"
        )


class Signals:
    """Notes SIGTERM and SIGINT while the block runs; a second one of them acts at once."""

    def __init__(self) -> None:
        self.caught: int | None = None

    def __enter__(self) -> Signals:
        # Python sets handlers in the main thread only; in another thread the caller handles signals
        self._before = (
            {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
            if threading.current_thread() is threading.main_thread()
            else {}
        )
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.caught = signum
        self._restore()

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def __exit__(self, *exc: object) -> None:
        self._restore()


class Run:
    """A trainer in its session: when to log, to evaluate, to write a checkpoint, and to stop.

    `data` is what must be the same, beside settings and backends, when the run is resumed. A kind of training is a
    subclass with its `command` and `evaluation`; it may override the methods from `finished` to `restore_extra`.
    """

    # the command line's name of this kind of training
    command: str

    def __init__(self, trainer: Trainer, session: Session[Any], data: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.session = session
        self.out = session.out
        self.world = world = session.world
        self.identity = session.identity(data)
        folder, keep = self.out / "checkpoints", trainer.config.keep_last
        self.checkpoints = store.Checkpoints(folder, keep)
        if world.shards > 1:
            self.checkpoints = ShardedCheckpoints(folder, keep, world, trainer.state)
        self.last_evaluation: dict[str, float] = {}
        self._metrics_size = 0

    def train(self) -> dict[str, float]:
        """Run to the last step, from the newest checkpoint on where the run is resumed; return the evaluation there.

        Raises Stopped after a signal, TrainingError, and ValueError for a checkpoint that is damaged or of another run.
        """
        t, session = self.trainer, self.session
        if session.resume:
            session.say(f"going on after step {self.resume()} of {t.steps}")
        self.progress = Progress(t.steps, t.at.step, session.quiet or not self.world.main)
        self.progress.goal = self.goal_shown()
        # signals first: TensorBoard's import takes seconds
        with (
            Signals() as signals,
            closing(
                Metrics(self.out, t.at.step, self._metrics_size, self.world.main)
            ) as self.metrics,
            self.progress,
        ):
            while True:
                self._evaluate_if_due()
                if self.finished():
                    break
                self._step()
                due = _due(t.at.step, t.config.checkpoint_every) and t.at.step < t.steps
                # a signal to one process stops all of them, after the same step
                caught = int(self.world.most(signals.caught or 0))
                if due or caught:
                    self.save()
                if caught and not self.world.main:
                    # the main process reports the signal
                    raise SystemExit(128 + caught)
                if caught:
                    raise Stopped(caught, t.at.step, self.out, self.command)
            self.save()
        return self.last_evaluation

    def _step(self) -> None:
        t, at = self.trainer, self.trainer.at
        started = time.perf_counter()
        result = t.train_step()
        seconds = time.perf_counter() - started
        at.seconds += seconds
        at.tokens += result.tokens
        at.window_steps += 1
        for name, value in result.losses.items():
            at.window[name] = at.window.get(name, 0.0) + value
        at.window_tokens += result.tokens
        at.window_seconds += seconds
        speed = at.window_tokens / at.window_seconds
        self.progress.advance(at.step, at.window["loss"] / at.window_steps, speed)
        if _due(at.step, t.config.log_every) or at.step == t.steps:
            self._log(result)

    def _log(self, result: StepResult) -> None:
        """Write the means since the last line, and start over."""
        t, at = self.trainer, self.trainer.at
        values = self.losses() | {
            "lr": t.optimiser.param_groups[0]["lr"],
            "grad_norm": result.norm,
            "epoch": at.epoch,
            "tokens": at.tokens,
            "tokens_per_s": at.window_tokens / at.window_seconds,
            "seconds": at.seconds,
        }
        self.metrics.write("train", at.step, values)
        self.progress.log(at.step, values, (t.steps - at.step) * at.seconds / at.step)
        at.window, at.window_steps, at.window_tokens, at.window_seconds = {}, 0, 0, 0.0

    def _evaluate_if_due(self) -> None:
        """Evaluate once at every step where it is due; a run that stopped before it does so when it is resumed."""
        t, at = self.trainer, self.trainer.at
        due = _due(at.step, t.config.eval_every) or at.step == t.steps
        if not due or at.evaluated == at.step:
            return
        values, line = self.evaluation()
        self.metrics.write("eval", at.step, values)
        self.last_evaluation = values
        at.evaluated = at.step
        self.progress.goal = self.goal_shown()
        self.progress.say(line)

    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.trainer.at.step == self.trainer.steps

    def goal_shown(self) -> str:
        """What may end the run before its last step, for the progress shown; "" for nothing."""
        return ""

    def losses(self) -> dict[str, float]:
        """The mean losses of the steps since the last log line."""
        at = self.trainer.at
        return {name: total / at.window_steps for name, total in at.window.items()}

    def evaluation(self) -> tuple[dict[str, float], str]:
        """Evaluate the model: the values to log, and a sentence with them."""
        raise NotImplementedError

    def extra(self) -> dict[str, Any]:
        """More values for a checkpoint, beside the trainer's state."""
        return {}

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take the values of `extra` from a checkpoint."""

    def save(self) -> Path:
        """Write a checkpoint of this step; raises TrainingError, with the older ones kept, where it can't."""
        at = self.trainer.at
        state = {
            **self.trainer.state(),
            "metrics": self.metrics.sync(),
            "identity": self.identity,
            "evaluation": self.last_evaluation,
            "torch": str(torch.__version__),
            **self.extra(),
        }
        try:
            return self.checkpoints.save(at.step, state)
        except OSError as error:
            raise TrainingError(
                f"the checkpoint of step {at.step} can't be written ({error}): free some space and go on with "
                f"--resume from the one before it"
            ) from error

    def resume(self) -> int:
        """Go on from the newest checkpoint, where there is one; returns its step, or 0."""
        if self.world.main:
            store.remove_unfinished(self.out)
            store.remove_unfinished(self.checkpoints.folder)
        state = self.checkpoints.load()
        if state is None:
            return 0
        before = state["identity"]
        kind = type(self.trainer.config)
        names = [f.name for f in dataclasses.fields(kind)]
        # a setting that is newer than the run had the value then that follows from the others
        settings = kind(**{name: before[name] for name in names if name in before}).to_dict()
        check_identity(settings | before, self.identity)
        if state["torch"] != str(torch.__version__):
            _log.warning(
                "this run was started with torch %s and goes on with %s: losses may differ in their last digits",
                state["torch"],
                torch.__version__,
            )
        self.trainer.restore(state)
        self.restore_extra(state)
        self.last_evaluation = state["evaluation"]
        self._metrics_size = state["metrics"]
        return self.trainer.at.step


def check_identity(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise ValueError, naming the first difference, for a checkpoint of another run."""
    for name, value in present.items():
        before = saved.get(name)
        if name == BACKENDS and before is not None:
            # an op that is newer than the run was no part of it
            value = {op: backend for op, backend in value.items() if op in before}
        if before != value:
            raise ValueError(
                f"the run can't be resumed: {name} was {quoted(before)} then and is {quoted(value)} now"
            )


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
