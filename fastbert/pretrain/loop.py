"""A pretraining run: evaluation on held-out documents, which may end it."""

from __future__ import annotations

import math

from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.evaluate import evaluate, judged_loss
from fastbert.pretrain.feed import Feed
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train.loop import Run
from fastbert.train.session import Session


class PretrainRun(Run):
    """A run whose evaluations read the held-out batches of `feed`; with the setting `goal` one of them may end it."""

    command = "pretrain"

    def __init__(
        self, trainer: PretrainTrainer, feed: Feed, session: Session[PretrainConfig]
    ) -> None:
        super().__init__(trainer, session, feed.identity())
        self.feed = feed
        self.judge = trainer.judge
        # the held-out loss that ends the run
        self.goal: float | None = None
        if trainer.config.goal is not None:
            # counting takes seconds: one process does it
            unigram = feed.baselines()["unigram entropy"] if self.world.main else 0.0
            self.goal = self.world.most(unigram) - trainer.config.goal

    def evaluation(self) -> tuple[dict[str, float], str]:
        """Evaluate the model: the values to log, and a sentence with them."""
        t = self.trainer
        values = evaluate(
            t.model,
            self.feed.held_out(),
            self.feed.mask_id,
            t.config.precision,
            self.world,
            self.judge,
        )
        line = f"held out at step {t.at.step}: loss {judged_loss(values):.4f}"
        line += "" if "lm_loss" in values else " where [MASK]"
        line += f", accuracy {values.get('accuracy_masked', values['accuracy']):.1%}"
        if "nsp_accuracy" in values:
            low, high = values["nsp_low"], values["nsp_high"]
            line += f"; next sentence {values['nsp_accuracy']:.1%} ({low:.1%} to {high:.1%})"
        return values, line

    def finished(self) -> bool:
        """Whether all steps are made, or the last evaluation has reached the goal."""
        return super().finished() or reached(self.last_evaluation, self.goal)

    def goal_shown(self) -> str:
        """The goal and the last evaluation, for the progress shown."""
        if self.goal is None:
            return ""
        last = judged_loss(self.last_evaluation)
        now = f", now {last:.2f}" if last < math.inf else ""
        return f"until the held-out loss is {self.goal:.2f}{now}"


def reached(evaluation: dict[str, float], goal: float | None) -> bool:
    """Whether an evaluation's loss is at most the goal; False without either."""
    return goal is not None and judged_loss(evaluation) <= goal
