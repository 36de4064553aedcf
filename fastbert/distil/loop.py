"""The steps of a distillation, and its run."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.data import Batch
from fastbert.distil.config import DistilConfig
from fastbert.distil.losses import terms
from fastbert.distil.plan import TERMS, UNJUDGED
from fastbert.distil.student import Distillation
from fastbert.distil.teacher import Teacher
from fastbert.distil.work import Work
from fastbert.train.best import KeepBest
from fastbert.train.session import Session, autocast
from fastbert.train.trainer import Trainer
from fastbert.train.world import World


class DistilTrainer(Trainer):
    """Steps on a batch's signals of the teacher; each loss is a sum over its terms / their number in the whole step."""

    replayable = False

    def __init__(
        self,
        model: Distillation,
        teacher: Teacher,
        work: Work,
        config: DistilConfig,
        world: World | None = None,
    ) -> None:
        super().__init__(model, work.batches, config, world)
        self.weights = model.losses.plan.weights
        self.losses = tuple(f"{name}_loss" for name in self.weights)
        self.teacher, self.work = teacher, work
        self._terms = sorted({TERMS[name] for name in self.weights})

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """The numbers of terms of the losses in the whole step, over all processes."""
        own = [terms(batch, self.work.labels(batch)) for batch in batches]
        totals = self.world.totals(*(float(sum(t[name] for t in own)) for name in self._terms))
        return {n: max(int(total), 1) for n, total in zip(self._terms, totals, strict=True)}

    def backward(self, batch: Batch, counts: dict[str, int]) -> Tensor:
        """Add one batch's gradients; returns its weighted losses, sums / the number of terms in the whole step."""
        with autocast(self.device, self.config.precision):
            signals = self.teacher(batch)
            losses = self.spread.call(batch, signals, counts)
        # gradients become means over the processes, and their sum is needed
        (losses.sum() * self.world.size).backward()
        return losses.detach().double()


class DistilRun(KeepBest):
    """A distillation, judged as the teacher's own training was."""

    command = "distill"

    def __init__(self, trainer: DistilTrainer, work: Work, session: Session[DistilConfig]) -> None:
        self.work, self.weights = work, trainer.weights
        self.metric, self.higher = work.metric, work.higher
        identity = {**work.identity(), "the teacher's weights": trainer.teacher.identity}
        super().__init__(trainer, session, identity)

    def better(self, value: float) -> bool:
        """Whether an evaluation is better than the best so far.

        Attention and relations alone train no head, and the metric says nothing: the last evaluation counts as best.
        """
        return self.weights.keys() <= UNJUDGED or super().better(value)

    def judged(self) -> dict[str, float]:
        """The values of an evaluation of the student."""
        model = self.trainer.model
        return self.work.judge(model.student, model.head)  # type: ignore[arg-type]

    def keep(self) -> None:
        """Write the student to OUT/model, in the layout of the teacher's kind."""
        model = self.trainer.model
        extras = self.work.extras(model.head)  # type: ignore[arg-type]
        with torch.no_grad():
            self.session.export(model.student, self.work.tokenizer, *extras)
