"""Fine-tuning's steps and its run: the best step's model is kept; training ends when the metric no longer improves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastbert.data import Batch
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.data import Data
from fastbert.finetune.features import Shuffled, items
from fastbert.finetune.judge import Part, predict
from fastbert.train.loop import Run
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


class FinetuneRun(Run):
    """A run that writes the model of its best evaluation to OUT/model as it goes."""

    command = "finetune"

    def __init__(self, trainer: Trainer, data: Data, session: Session[FinetuneConfig]) -> None:
        super().__init__(trainer, session, data.identity())
        self.data = data
        self.config = session.config
        self.metric = self.config.metric or data.task.metric
        # the best evaluation so far, and the number of evaluations since
        self.best: dict[str, Any] = {"step": 0, "value": None, "since": 0}

    def evaluation(self) -> tuple[dict[str, float], str]:
        """Judge the model on the validation data, and keep it if it is the best so far."""
        data, model = self.data, self.trainer.model
        values = judge(model, data, data.validation, self.config)[0]
        value, step = values[self.metric], self.trainer.at.step
        if self.best["value"] is None or value > self.best["value"]:
            self.best = {"step": step, "value": value, "since": 0}
            self.session.export(model, data.tokenizer, data.task.options.save)
        else:
            self.best["since"] += 1
        line = f"validation at step {step}: loss {values['loss']:.4f}, {self.metric} {value:.4f}"
        if self.best["since"]:
            line += f" (best {self.best['value']:.4f} at step {self.best['step']})"
        return values, line

    def finished(self) -> bool:
        """Whether all steps are made, or the metric has not improved for `patience` evaluations."""
        patience = self.config.patience
        return super().finished() or 0 < patience <= self.best["since"]

    def extra(self) -> dict[str, Any]:
        """The best evaluation so far."""
        return {"best": self.best}

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take the best evaluation from a checkpoint."""
        self.best = state["best"]


def judge(
    model: nn.Module, data: Data, part: Part, config: FinetuneConfig
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of a model on labelled examples, and its predictions."""
    predictions, loss = predict(model, data.task, part, config.batch_size, config.precision)
    return {"loss": loss, **data.task.metrics(part.examples, predictions)}, predictions


def training_data(data: Data, config: FinetuneConfig) -> Shuffled:
    """The batches that the trainer takes."""
    return Shuffled(data.train.features, config.batch_size, config.seed)
