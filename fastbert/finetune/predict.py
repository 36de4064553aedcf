"""Predictions of a fine-tuned model on texts, or on files of records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbert.data import load_tokenizer
from fastbert.files import listed, quoted, why_not_text
from fastbert.finetune.answer import Question
from fastbert.finetune.classify import Classify, Text, scale_of
from fastbert.finetune.config import Options, trained_model
from fastbert.finetune.judge import Part, make_task, predict
from fastbert.finetune.records import read_records
from fastbert.finetune.tag import Words
from fastbert.models.checkpoint import check_whole
from fastbert.models.config import BertConfig
from fastbert.runners.freeze import quantize_loaded

# the last part of an architecture's name in config.json
_HEADS = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "answer",
}


class Predictor:
    """Predicts with the model in a folder: of a run of `fastbert finetune`, or one with a head that transformers saved.

    `int8` quantises its encoder (fastbert.quantize). Raises FileNotFoundError or ValueError for a folder without such a
    model.
    """

    def __init__(self, folder: str | Path, batch_size: int = 32, int8: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        folder = trained_model(folder)
        config = BertConfig.from_file(folder)
        options = Options.load(folder) or _guessed(config, folder)
        self.options = options
        self.batch_size = batch_size
        self.task = make_task(options, config.labels)
        if isinstance(self.task, Classify):
            self.task.scale = scale_of(config)
            if len(set(config.labels)) < len(config.labels):
                raise ValueError(
                    f"{folder / 'config.json'}: id2label gives two classes one name: tell them apart there"
                )
        self.model = self.task.kind.from_pretrained(folder)
        check_whole(self.model, folder)
        if int8:
            quantize_loaded(self.model)
        self.tokenizer = load_tokenizer(folder)
        # the number of examples in the last call that were longer than the model takes
        self.cut = 0

    def texts(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """A prediction per text; `pairs` are second texts, `contexts` the texts that questions are answered from."""
        task = self.options.task
        _check_count("pairs", pairs, texts, task == "classify" and self.options.pair is not None)
        _check_count("contexts", contexts, texts, task == "answer")
        for number, text in enumerate(texts, 1):
            if reason := why_not_text(text):
                raise ValueError(f"text {number} {reason}")
        if task == "tag":
            return self._run([self._words(text, number) for number, text in enumerate(texts, 1)])
        if task == "answer":
            assert contexts is not None
            return self._run([Question(q, c) for q, c in zip(texts, contexts, strict=True)])
        seconds: Sequence[str | None] = pairs or [None] * len(texts)
        return self._run([Text(a, b) for a, b in zip(texts, seconds, strict=True)])

    def records(
        self, source: Any, split: str = "test"
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """A prediction per record of a file, a data set or a list of dicts; metrics where all records have labels."""
        examples = self._examples(source, split, labelled=False)
        predictions = self._run([_bare(e) for e in examples])
        if not all(_answered(e) for e in examples):
            return predictions, {}
        self._check_labels(examples, source)
        return predictions, self.task.metrics(examples, predictions)

    def labelled(self, source: Any, split: str = "train") -> list[Any]:
        """The examples of a file, a data set or a list of dicts, which must have labels that the model knows."""
        examples = self._examples(source, split, labelled=True)
        self._check_labels(examples, source)
        return examples

    def _examples(self, source: Any, split: str, labelled: bool) -> list[Any]:
        found = read_records(source, split, conll=self.options.task == "tag")
        return [self.task.read(record, labelled=labelled) for record in found]

    def _check_labels(self, examples: list[Any], source: Any) -> None:
        strangers = {name for e in examples for name in self.task.labels(e)} - {*self.task.names}
        if strangers:
            raise ValueError(
                f"{_named(source)} has labels that the model has not, {listed(sorted(strangers), 5)}: it has "
                f"{listed(self.task.names)}"
            )

    def _words(self, text: str, number: int) -> Words:
        found = Words.of_text(text, self.options.characters)
        if not found.words:
            raise ValueError(f"text {number} is {quoted(text)}, which has no word: leave it out")
        return found

    def _run(self, examples: list[Any]) -> list[dict[str, Any]]:
        part = Part.of(examples, self.task, self.tokenizer, self.model.config)
        self.cut = part.features.cut
        predictions, loss = predict(self.model, self.task, part, self.batch_size)
        assert math.isnan(loss)
        return predictions


def _guessed(config: BertConfig, folder: Path) -> Options:
    """The options of a model that was trained elsewhere, from the name of its head."""
    names = config.extra.get("architectures")
    name = str(names[0])[:80] if isinstance(names, list) and names else ""
    task = next((t for head, t in _HEADS.items() if name.endswith(head)), None)
    if task is None:
        raise ValueError(
            f"the model in {folder} is {name or 'of no named class'}: predict takes one with a head for "
            "classification, tags or answers, such as fastbert finetune makes"
        )
    longest = min(config.max_length, 512)
    # nothing says whether its training had questions without an answer: it always gives one
    return Options(task, longest, stride=longest // 3, unanswerable=False)


def _check_count(
    name: str, values: Sequence[str] | None, texts: Sequence[str], wanted: bool
) -> None:
    if wanted and values is None:
        raise ValueError(f"this model takes two texts at once: pass {name} too, --{name[:-1]}")
    if values is not None and name == "contexts" and not wanted:
        raise ValueError("contexts belong to questions, which this model does not answer")
    if values is not None and len(values) != len(texts):
        raise ValueError(f"{len(texts)} texts and {len(values)} {name}: pass as many of each")


def _bare(example: Any) -> Any:
    """The example without its labels, which predictions must not depend on."""
    if isinstance(example, Text):
        return Text(example.text, example.pair)
    if isinstance(example, Words):
        return Words(example.words, None, example.spans)
    return Question(example.question, example.context, None, example.name)


def _answered(example: Any) -> bool:
    if isinstance(example, Text):
        return example.label is not None
    return (example.tags if isinstance(example, Words) else example.answers) is not None


def _named(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the data"
