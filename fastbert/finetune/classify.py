"""Classification of texts and of pairs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.data import Batch
from fastbert.files import listed, quoted, why_not_unicode
from fastbert.finetune.config import Options
from fastbert.finetune.features import Features
from fastbert.finetune.records import Record
from fastbert.models.config import BertConfig
from fastbert.models.heads import BertForSequenceClassification
from fastbert.models.output import Output
from fastbert.train.metrics import wilson

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Text:
    """A text, or two of them, and its label."""

    text: str
    pair: str | None = None
    label: str | None = None


class Classify:
    """Classes of texts; `names` are the labels by number.

    `scale` says how scores become predictions: softmax for classes, sigmoid where each label is true or not by itself,
    none for plain numbers. Training knows classes only.
    """

    kind = BertForSequenceClassification
    metric = "accuracy"

    def __init__(self, options: Options, names: Sequence[str] = (), scale: str = "softmax") -> None:
        self.options = options
        self.names = list(names)
        self.scale = scale

    def read(self, record: Record, labelled: bool) -> Text:
        """The example of a record."""
        o = self.options
        label = None
        classes = self.scale == "softmax"
        if labelled or (classes and record.values.get(o.label) not in (None, "")):
            label = label_name(record.value(o.label), record.place)
        pair = None if o.pair is None else record.string(o.pair)
        return Text(record.string(o.text), pair, label)

    def group(self, example: Text) -> Any:
        """Examples of one group are held out together: the same text twice is one."""
        return example.text, example.pair

    def labels(self, example: Text) -> tuple[str, ...]:
        """The labels of an example."""
        return () if example.label is None else (example.label,)

    def learn(self, examples: Sequence[Text]) -> None:
        """Take the labels from the training data; raises ValueError where there is nothing to tell apart."""
        found = {e.label for e in examples if e.label is not None}
        if len(found) < 2:
            raise ValueError(
                f"the training data has one label only, {listed(found)}: there is nothing to tell apart"
            )
        if len(found) > 1000 or (len(found) > 20 and 2 * len(found) > len(examples)):
            raise ValueError(
                f"column {quoted(self.options.label)} has {len(found)} labels in {len(examples)} examples: are these "
                "classes? name the right column with label"
            )
        self.names = ordered(found)

    def encode(self, tokenizer: Any, examples: Sequence[Text]) -> Features:
        """Tokenise; a text beyond max_length is cut, a pair at the end of its longer text."""
        features = Features()
        numbers = {name: i for i, name in enumerate(self.names)}
        texts = [e.text if e.pair is None else (e.text, e.pair) for e in examples]
        tokenizer.enable_truncation(self.options.max_length, strategy="longest_first")
        encodings = tokenizer.encode_batch(texts)
        tokenizer.no_truncation()
        features.cut = sum(bool(e.overflowing) for e in encodings)
        labelled = all(e.label is not None for e in examples)
        for i, (encoding, example) in enumerate(zip(encodings, examples, strict=True)):
            target = {"labels": [numbers[example.label]]} if labelled and example.label else {}
            features.add(encoding.ids, encoding.type_ids, i, **target)
        return features

    def scores(self, output: Output, batch: Batch) -> list[Floats]:
        """The logits (K,) of every sequence."""
        assert output.logits is not None
        return list(output.logits.float().cpu().numpy())

    def predictions(
        self, examples: Sequence[Text], features: Features, scores: Sequence[Floats]
    ) -> list[dict[str, Any]]:
        """The label of every example and the probability of each: plain numbers for a regression."""
        scale = {"softmax": softmax, "sigmoid": sigmoid, "none": lambda logits: logits}[self.scale]
        found = []
        for example, logits in zip(examples, scores, strict=True):
            p = scale(logits)
            best = int(p.argmax())
            texts = {"text": example.text}
            if example.pair is not None:
                texts["pair"] = example.pair
            probabilities = dict(zip(self.names, map(float, p), strict=True))
            answer = {"label": self.names[best], "probability": float(p[best])}
            found.append({**texts, **answer, "probabilities": probabilities})
        return found

    def metrics(
        self, examples: Sequence[Text], predictions: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """Accuracy with its 95 % interval (Wilson), macro F1, and F1 by label."""
        _, matrix = self.confusion(examples, predictions)
        right, total = int(np.trace(matrix)), int(matrix.sum())
        low, high = wilson(right, total)
        # 2 right / (predicted + true), 0 where a label is in neither
        f1 = 2 * np.diag(matrix) / np.maximum(matrix.sum(0) + matrix.sum(1), 1)
        values = {"accuracy": right / total, "accuracy_low": low, "accuracy_high": high}
        by_label = {f"f1_{name}": float(v) for name, v in zip(self.names, f1, strict=True)}
        return {**values, "f1": float(f1.mean()), **by_label}

    def confusion(
        self, examples: Sequence[Text], predictions: Sequence[dict[str, Any]]
    ) -> tuple[list[str], NDArray[np.int64]]:
        """Names, and counts (true, predicted)."""
        numbers = {name: i for i, name in enumerate(self.names)}
        true = [numbers[e.label] for e in examples if e.label is not None]
        guessed = [numbers[p["label"]] for p in predictions]
        return self.names, counts(true, guessed, len(self.names))


def label_name(value: Any, place: str) -> str:
    """A label as text; raises ValueError for a value that can't be a class."""
    if isinstance(value, bool) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{place}: the label is {quoted(value)}: it must be the name or number of a class"
        )
    if reason := why_not_unicode(value):
        raise ValueError(f"{place}: the label {reason}")
    return value.strip()


def ordered(names: set[str]) -> list[str]:
    """Numbers by value, then names by the alphabet."""
    number = {n: int(n) for n in names if n.lstrip("-").isdecimal() and n.lstrip("-").isascii()}
    return sorted(names, key=lambda n: (n not in number, number.get(n, 0), n))


def softmax(logits: Floats) -> Floats:
    """Over the last dimension."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(logits: Floats) -> Floats:
    """Of every number, without overflow."""
    e = np.exp(-np.abs(logits))
    return np.where(logits >= 0, np.float32(1), e) / (1 + e)


def scale_of(config: BertConfig) -> str:
    """How a classifier's scores are read, as in the text-classification pipeline of transformers."""
    if config.problem_type == "regression":
        return "none"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"


def counts(true: Sequence[int], guessed: Sequence[int], n: int) -> NDArray[np.int64]:
    """(n, n) counts: a row for each true class, a column for each predicted one."""
    flat = np.asarray(true, np.int64) * n + np.asarray(guessed, np.int64)
    return np.bincount(flat, minlength=n * n).reshape(n, n)
