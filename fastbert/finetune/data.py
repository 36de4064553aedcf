"""The data of a fine-tuning run: examples of its parts, their labels, and all of it tokenised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastbert.data import load_tokenizer, tokenizer_hash
from fastbert.files import listed, quoted
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.features import split
from fastbert.finetune.judge import Part, make_task
from fastbert.finetune.records import read_records
from fastbert.models.config import BertConfig


@dataclass
class Sources:
    """Data in memory, in place of the settings' files: datasets, or lists of dicts."""

    train: Any = None
    validation: Any = None
    test: Any = None


@dataclass
class Data:
    """A run's parts, its task with the labels, and its tokenizer."""

    task: Any
    tokenizer: Any
    train: Part
    validation: Part
    test: Part | None

    def identity(self) -> dict[str, Any]:
        """Hashes of the tokenizer and of the examples: a run is resumed with the same ones only."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "the tokenizer": tokenizer_hash(self.tokenizer),
            **{f"the {name} data": _hash(part) for name, part in parts.items()},
        }

    def sizes(self) -> dict[str, int]:
        """The number of examples of each part."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: len(part.examples) for name, part in parts.items() if part is not None}

    def describe(self) -> str:
        """The sizes of the data in a few words."""
        sizes = ", ".join(f"{count} {name}" for name, count in self.sizes().items())
        cut = self.train.features.cut
        more = (
            f", {cut} training examples cut to {self.task.options.max_length} tokens" if cut else ""
        )
        labels = f", {len(self.task.names)} labels" if self.task.names else ""
        return f"{sizes} examples{labels}{more}"


def load_data(config: FinetuneConfig, given: Sources) -> Data:
    """Read, split and tokenise. Raises ValueError, FileNotFoundError for data that can't be used."""
    assert config.model is not None
    task = make_task(config.options())
    train = _training(config, given, task)
    task.learn(train)
    base = BertConfig.from_file(config.model)
    if base.id2label and sorted(base.id2label.values()) == sorted(task.names):
        # a classifier that is trained further keeps the numbers of its labels
        task.names = base.labels
    validation = _optional(given.validation or config.validation, "validation", task)
    if validation is None:
        groups = [task.group(e) for e in train]
        kept, held = split(groups, config.heldout, config.split_seed)
        train, validation = [train[i] for i in kept], [train[i] for i in held]
    test = _optional(given.test or config.test, "test", task)
    # a model learns to give no answer from questions without one only
    unanswerable = config.task == "answer" and not all(e.answers for e in train)
    task.options = replace(task.options, unanswerable=unanswerable)
    for name, examples in (("validation", validation), ("test", test or [])):
        _check_labels(task, examples, name)
    tokenizer = load_tokenizer(config.model)
    return Data(
        task,
        tokenizer,
        Part.of(train, task, tokenizer, base),
        Part.of(validation, task, tokenizer, base),
        None if test is None else Part.of(test, task, tokenizer, base),
    )


def _training(config: FinetuneConfig, given: Sources, task: Any) -> list[Any]:
    sources = config.sources if given.train is None else [given.train]
    if not sources:
        raise ValueError(
            "sources is empty: name the file of the training data (in Python: or pass train=)"
        )
    conll = config.task == "tag"
    records = [r for source in sources for r in read_records(source, "train", conll)]
    return [task.read(record, labelled=True) for record in records]


def _optional(source: Any, split: str, task: Any) -> list[Any] | None:
    """The examples of an optional part, or None."""
    if source is None:
        return None
    records = read_records(source, split, task.options.task == "tag")
    return [task.read(record, labelled=True) for record in records]


def _check_labels(task: Any, examples: Sequence[Any], part: str) -> None:
    known = set(task.names)
    for example in examples:
        for label in task.labels(example):
            if label not in known:
                raise ValueError(
                    f"label {quoted(label)} of the {part} data is not among those of the training data "
                    f"({listed(task.names)}): correct it, or add examples of it"
                )


def _hash(part: Part | None) -> str | None:
    """A hash of the examples as they were read."""
    if part is None:
        return None
    digest = hashlib.sha256()
    for example in part.examples:
        digest.update(json.dumps(asdict(example)).encode() + b"\n")
    return digest.hexdigest()
