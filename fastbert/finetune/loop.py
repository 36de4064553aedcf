"""Fine-tuning's steps and its run: the best step's model is kept; training ends when the metric no longer improves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastbert.data import Batch
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.data import Data
from fastbert.finetune.features import Shuffled, items
from fastbert.finetune.judge import Part, predict
from fastbert.train.best import KeepBest
from fastbert.train.session import Session, autocast
from fastbert.train.trainer import Trainer


class FinetuneTrainer(Trainer):
    """Steps on labelled batches; the loss of a step is the sum over its labels / their number, over all batches."""

    def __init__(self, model: nn.Module, data: Shuffled, config: FinetuneConfig) -> None:
        super().__init__(model, data, config)
        if config.accumulate > 1:
            # a replayed step's loss is the mean over its own batch
            self._replayed = None

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """The number of labels in the whole step."""
        return {"items": max(int(self.world.total(sum(map(items, batches)))), 1)}

    def backward(self, batch: Batch, counts: dict[str, int]) -> Tensor:
        """Add one batch's gradients; returns its part of the loss."""
        with autocast(self.device, self.config.precision):
            if self._replayed is not None:
                loss = self._replayed(**batch).loss
            else:
                loss = self.model(**batch).loss * (items(batch) / counts["items"])
                loss.backward()
        assert loss is not None
        return loss[None].detach().double()


class FinetuneRun(KeepBest):
    """A fine-tuning, judged on the validation data."""

    command = "finetune"

    def __init__(self, trainer: Trainer, data: Data, session: Session[FinetuneConfig]) -> None:
        super().__init__(trainer, session, data.identity())
        self.data = data
        self.config = session.config
        self.metric = self.config.metric or data.task.metric

    def judged(self) -> dict[str, float]:
        """The loss and the metrics on the validation data."""
        return judge(self.trainer.model, self.data, self.data.validation, self.config)[0]

    def keep(self) -> None:
        """Write the model to OUT/model, with the options that predictions need."""
        options = self.data.task.options
        self.session.export(self.trainer.model, self.data.tokenizer, options.save)


def judge(
    model: nn.Module, data: Data, part: Part, config: FinetuneConfig
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of a model on labelled examples, and its predictions."""
    predictions, loss = predict(model, data.task, part, config.batch_size, config.precision)
    return {"loss": loss, **data.task.metrics(part.examples, predictions)}, predictions


def training_data(data: Data, config: FinetuneConfig) -> Shuffled:
    """The batches that the trainer takes."""
    return Shuffled(data.train.features, config.batch_size, config.seed)
