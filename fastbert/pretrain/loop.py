"""A pretraining run: evaluation on held-out documents."""

from __future__ import annotations

from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.evaluate import evaluate
from fastbert.pretrain.feed import Feed
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train.loop import Run
from fastbert.train.session import Session


class PretrainRun(Run):
    """A run whose evaluations read the held-out batches of `feed`."""

    command = "pretrain"

    def __init__(
        self, trainer: PretrainTrainer, feed: Feed, session: Session[PretrainConfig]
    ) -> None:
        super().__init__(trainer, session, feed.identity())
        self.feed = feed
        self.judge = trainer.judge

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
        line = f"held out at step {t.at.step}: loss {values['mlm_loss_masked']:.4f} where [MASK]"
        line += f", accuracy {values['accuracy_masked']:.1%}"
        if "nsp_accuracy" in values:
            low, high = values["nsp_low"], values["nsp_high"]
            line += f"; next sentence {values['nsp_accuracy']:.1%} ({low:.1%} to {high:.1%})"
        return values, line
