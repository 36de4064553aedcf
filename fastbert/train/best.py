"""Runs that keep the model of their best evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastbert.train.loop import Run
from fastbert.train.session import Session
from fastbert.train.trainer import Trainer


class KeepBest(Run):
    """A run that writes the model of its best evaluation as it goes, and may end when there is no better one.

    A subclass sets `metric` and has `judged` and `keep`.
    """

    # the value of an evaluation by which it is compared, and whether more is better
    metric: str
    higher = True

    def __init__(self, trainer: Trainer, session: Session[Any], data: Mapping[str, Any]) -> None:
        super().__init__(trainer, session, data)
        # the best evaluation so far, and the number of evaluations since
        self.best: dict[str, Any] = {"step": 0, "value": None, "since": 0}

    def judged(self) -> dict[str, float]:
        """The values of an evaluation, `metric` among them."""
        raise NotImplementedError

    def keep(self) -> None:
        """Write the model, in place of an earlier one."""
        raise NotImplementedError

    def better(self, value: float) -> bool:
        """Whether a value of the metric is better than the best so far."""
        best: float = self.best["value"]
        return value > best if self.higher else value < best

    def evaluation(self) -> tuple[dict[str, float], str]:
        """Judge the model, and keep it if it is the best so far."""
        values = self.judged()
        value, step = values[self.metric], self.trainer.at.step
        if self.best["value"] is None or self.better(value):
            self.best = {"step": step, "value": value, "since": 0}
            self.keep()
        else:
            self.best["since"] += 1
        shown = dict.fromkeys(n for n in ("loss", self.metric) if n in values)
        line = f"validation at step {step}: "
        line += ", ".join(f"{name} {values[name]:.4f}" for name in shown)
        if self.best["since"]:
            line += f" (best {self.best['value']:.4f} at step {self.best['step']})"
        return values, line

    def finished(self) -> bool:
        """Whether all steps are made, or the metric has not improved for `patience` evaluations."""
        patience = self.trainer.config.patience  # type: ignore[attr-defined]
        return super().finished() or 0 < patience <= self.best["since"]

    def extra(self) -> dict[str, Any]:
        """The best evaluation so far."""
        return {"best": self.best}

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take the best evaluation from a checkpoint."""
        self.best = state["best"]
