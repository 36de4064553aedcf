"""A task by name, and a model's predictions on examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastbert.finetune.answer import Answer
from fastbert.finetune.classify import Classify
from fastbert.finetune.config import Options
from fastbert.finetune.features import Features, items
from fastbert.finetune.tag import Tag
from fastbert.models.config import BertConfig
from fastbert.train.session import autocast

Task = Classify | Tag | Answer

_KINDS: dict[str, type[Task]] = {"classify": Classify, "tag": Tag, "answer": Answer}


def make_task(options: Options, names: Sequence[str] = ()) -> Any:
    """The task of these options, whose labels are `names`."""
    return _KINDS[options.task](options, names)


@dataclass
class Part:
    """A part of the data: its examples and the sequences they became."""

    examples: list[Any]
    features: Features

    @classmethod
    def of(cls, examples: list[Any], task: Any, tokenizer: Any, config: BertConfig) -> Part:
        """Tokenised for a model of this config; where it has a single token type, all types are 0.

        Raises ValueError for a token that the model lacks.
        """
        features = task.encode(tokenizer, examples)
        features.check_tokens(config.vocab_size)
        if config.type_vocab_size == 1:
            features.types = [np.zeros_like(types) for types in features.types]
        return cls(examples, features)


@torch.no_grad()
def predict(
    model: nn.Module, task: Any, part: Part, batch_size: int, precision: str = "fp32"
) -> tuple[list[dict[str, Any]], float]:
    """The predictions of every example, and the mean loss (NaN without labels)."""
    device = next(model.parameters()).device
    scores: list[Any] = []
    loss, terms, training = 0.0, 0, model.training
    model.eval()
    try:
        with autocast(device, precision):
            for batch in part.features.batches(batch_size):
                output = model(**batch.to(device))
                scores += task.scores(output, batch)
                if output.loss is not None:
                    n = items(batch)
                    loss, terms = loss + float(output.loss) * n, terms + n
    finally:
        model.train(training)
    mean = loss / terms if terms else float("nan")
    return task.predictions(part.examples, part.features, scores), mean
