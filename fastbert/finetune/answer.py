"""Extractive question answering: the part of a text that answers a question, or that there is none."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.data import Batch
from fastbert.files import quoted, why_not_text
from fastbert.finetune.config import Options
from fastbert.finetune.features import Features
from fastbert.finetune.records import Record
from fastbert.models.heads import BertForQuestionAnswering
from fastbert.models.output import Output

Floats = NDArray[np.float32]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """A question on a text, and its answers with their first characters: () where the text has none."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None = None
    name: str | None = None


class Answer:
    """Answers to questions; there are no labels."""

    kind = BertForQuestionAnswering
    metric = "f1"

    def __init__(self, options: Options, names: Sequence[str] = ()) -> None:
        self.options = options
        self.names = list(names)

    def read(self, record: Record, labelled: bool) -> Question:
        """The example of a record, in the layouts of SQuAD and of a table with columns answer and answer_start."""
        context = record.string("context")
        given = any(record.values.get(n) is not None for n in ("answers", "answer"))
        answers = _answers(record, context) if labelled or given else None
        name = record.values.get("id")
        return Question(
            record.string("question"), context, answers, None if name is None else str(name)
        )

    def group(self, example: Question) -> Any:
        """Examples of one group are held out together: all questions on a text."""
        return example.context

    def labels(self, example: Question) -> tuple[str, ...]:
        """The labels of an example: none."""
        return ()

    def learn(self, examples: Sequence[Question]) -> None:
        """Raise ValueError where no question has an answer."""
        if not any(e.answers for e in examples):
            raise ValueError(
                "no question of the training data has an answer: there is nothing to learn"
            )

    def encode(self, tokenizer: Any, examples: Sequence[Question]) -> Features:
        """Tokenise question and text; a long text is cut into parts that share `stride` tokens.

        In a part without the answer the target is the first token, as for a question without an answer.
        """
        o, features = self.options, Features()
        tokenizer.enable_truncation(o.max_length // 3)
        short = tokenizer.encode_batch([e.question for e in examples])
        questions = [_kept(e.question, s) for e, s in zip(examples, short, strict=True)]
        features.cut = sum(bool(s.overflowing) for s in short)
        tokenizer.enable_truncation(o.max_length, stride=o.stride, strategy="only_second")
        encodings = tokenizer.encode_batch(
            [(q, e.context) for q, e in zip(questions, examples, strict=True)]
        )
        tokenizer.no_truncation()
        for i, (encoding, example) in enumerate(zip(encodings, examples, strict=True)):
            for part in (encoding, *encoding.overflowing):
                inside = np.array([s == 1 for s in part.sequence_ids])
                # (S, 2) first character and the one after the last, -1 outside of the text
                spans = np.where(inside[:, None], np.array(part.offsets, np.int64), -1)
                start, end = _target(example, spans)
                positions = {"start_positions": [start], "end_positions": [end]}
                target = {} if example.answers is None else positions
                features.add(part.ids, part.type_ids, i, **target)
                features.places.append(spans)
        return features

    def scores(self, output: Output, batch: Batch) -> list[Floats]:
        """The scores (S_i, 2) of every sequence's tokens as start and as end."""
        assert output.start_logits is not None
        assert output.end_logits is not None
        bounds = batch["cu_seqlens"][1:-1].cpu().numpy()
        pairs = np.stack(
            [t.float().cpu().numpy() for t in (output.start_logits, output.end_logits)], 1
        )
        return np.split(pairs, bounds)

    def predictions(
        self, examples: Sequence[Question], features: Features, scores: Sequence[Floats]
    ) -> list[dict[str, Any]]:
        """The best answer of every question, over all parts of its text; "" where no answer scores higher."""
        none = np.full(len(examples), np.inf)
        best: list[tuple[float, int, int]] = [(-np.inf, 0, 0) for _ in examples]
        for owner, spans, values in zip(features.owners, features.places, scores, strict=True):
            none[owner] = min(none[owner], float(values[0].sum()))
            best[owner] = max(best[owner], _best(spans, values, self.options.longest_answer))
        found = []
        for example, (score, start, end), nothing in zip(examples, best, none, strict=True):
            if score == -np.inf or (self.options.unanswerable and nothing > score):
                start = end = 0
            named = {} if example.name is None else {"id": example.name}
            answer = {"answer": example.context[start:end], "start": start, "end": end}
            margin = {"margin": float(score - nothing)} if np.isfinite(score) else {}
            found.append({**named, "question": example.question, **answer, **margin})
        return found

    def metrics(
        self, examples: Sequence[Question], predictions: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """Exact matches and F1 over words, the best over a question's answers, as SQuAD counts them."""
        exact, f1 = [], []
        for example, prediction in zip(examples, predictions, strict=True):
            true = [text for text, _ in example.answers or ()] or [""]
            exact.append(max(plain(t) == plain(prediction["answer"]) for t in true))
            f1.append(max(overlap(t, prediction["answer"]) for t in true))
        return {"exact": float(np.mean(exact)), "f1": float(np.mean(f1))}

    def confusion(self, examples: Sequence[Question], predictions: Sequence[Any]) -> None:
        """None: answers have no classes."""


def plain(text: str) -> str:
    """A text as SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    bare = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(bare.split())


def overlap(true: str, guessed: str) -> float:
    """F1 of the words of two texts (Rajpurkar et al. 2016); two empty ones agree."""
    a, b = plain(true).split(), plain(guessed).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def _answers(record: Record, context: str) -> tuple[tuple[str, int], ...]:
    """The answers of a record, each one found in the text."""
    if "answers" not in record.values and "answer" in record.values:
        text, start = record.values["answer"], record.values.get("answer_start")
        pairs = [(text, start)] if text else []
    else:
        value = record.value("answers")
        try:
            if isinstance(value, dict):
                pairs = list(zip(value["text"], value["answer_start"], strict=True))
            else:
                pairs = [(answer["text"], answer["answer_start"]) for answer in value]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{record.place}: answers is {quoted(value)}: pass text and answer_start, as SQuAD has them"
            ) from error
    return tuple(_found(text, start, context, record.place) for text, start in pairs)


def _found(text: Any, start: Any, context: str, place: str) -> tuple[str, int]:
    if reason := why_not_text(text):
        raise ValueError(f"{place}: an answer {reason}")
    try:
        at = context.find(text) if start in (None, "") else int(start)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{place}: answer_start is {quoted(start)}: it must be a number"
        ) from error
    if at < 0 or context[at : at + len(text)] != text:
        raise ValueError(
            f"{place}: the answer {quoted(text)} does not stand in the context"
            + ("" if start in (None, "") else f" at character {at}")
        )
    return text, at


def _kept(question: str, encoding: Any) -> str:
    """The question, or as much of it as the encoding has kept."""
    return question[: max(end for _, end in encoding.offsets)] if encoding.overflowing else question


def _target(example: Question, spans: NDArray[np.int64]) -> tuple[int, int]:
    """The tokens that the first answer begins and ends in; (0, 0) where it is not whole in this part."""
    if not example.answers:
        return 0, 0
    text, first = example.answers[0]
    last = first + len(text) - 1
    start = np.flatnonzero((spans[:, 0] <= first) & (first < spans[:, 1]))
    end = np.flatnonzero((spans[:, 0] <= last) & (last < spans[:, 1]))
    return (int(start[0]), int(end[-1])) if len(start) and len(end) else (0, 0)


def _best(spans: NDArray[np.int64], values: Floats, longest: int) -> tuple[float, int, int]:
    """(score, first character, character after the last) of the best span of at most `longest` tokens."""
    inside = np.flatnonzero(spans[:, 0] >= 0)
    if len(inside) == 0:
        return -np.inf, 0, 0
    start, end = values[inside, 0], values[inside, 1]
    sums = start[:, None] + end[None, :]  # (S, S)
    n = len(inside)
    allowed = np.tri(n, n, longest - 1, dtype=bool) & ~np.tri(n, n, -1, dtype=bool)
    i, j = np.unravel_index(np.where(allowed, sums, -np.inf).argmax(), sums.shape)
    return float(sums[i, j]), int(spans[inside[i], 0]), int(spans[inside[j], 1])
