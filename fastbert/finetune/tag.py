"""Classification of words: named entities and the like, with labels at each word's first piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from fastbert.data import Batch, SpecialIds
from fastbert.data.tokenizer import is_roberta
from fastbert.files import listed, quoted, why_not_unicode
from fastbert.finetune.classify import counts, ordered, softmax
from fastbert.finetune.config import Options
from fastbert.finetune.features import Features
from fastbert.finetune.records import Record
from fastbert.models.heads import BertForTokenClassification
from fastbert.models.output import Output

Floats = NDArray[np.float32]

# B- and I- (and L-, E-: the last; U-, S-: the only) word of an entity; O outside
_ENTITY = regex.compile(r"O|[BILEUS]-.+")
_LAST_OR_ONLY = str.maketrans("LU", "ES")

# a letter, digit or _ with all marks that belong to it
_LETTER = r"(?=[\w\p{N}])\X"
# soft hyphens, marks of direction and the like, which are part of a word between its letters
_FORMAT = r"\p{Word_Break=Format}"
# whatever else is seen, with its marks: a punctuation mark, an emoji; U+200B and the separators of ASCII are blanks
_OTHER = rf"(?![\s\u200b\x1c-\x1f{_FORMAT}])(?:\p{{Regional_Indicator}}{{2}}|\X)"
_CHINESE_OR_JAPANESE = r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}]"
_WORDS = regex.compile(rf"{_LETTER}(?:{_FORMAT}*{_LETTER})*|{_OTHER}")
_WORDS_AND_CHARACTERS = regex.compile(
    rf"(?={_CHINESE_OR_JAPANESE}){_LETTER}"
    rf"|{_LETTER}(?:{_FORMAT}*(?!{_CHINESE_OR_JAPANESE}){_LETTER})*|{_OTHER}"
)
_CHARACTER = regex.compile(rf"(?={_CHINESE_OR_JAPANESE}){_LETTER}")


@dataclass(frozen=True)
class Words:
    """A sentence in words, with their tags, and with their places where it was plain text."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    spans: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of_text(cls, text: str, characters: bool = True) -> Words:
        """Words and single punctuation marks of a text; with `characters` every Chinese or Japanese one is a word."""
        found = list((_WORDS_AND_CHARACTERS if characters else _WORDS).finditer(text))
        return cls(tuple(m[0] for m in found), None, tuple(m.span() for m in found))


class Tag:
    """Tags of words; `names` are the tags by number."""

    kind = BertForTokenClassification

    def __init__(self, options: Options, names: Sequence[str] = ()) -> None:
        self.options = options
        self.names = list(names)

    @property
    def entities(self) -> bool:
        """Whether the tags mark entities, as B-PER does, and not every word by itself."""
        return any(n != "O" for n in self.names) and all(map(_ENTITY.fullmatch, self.names))

    @property
    def metric(self) -> str:
        """F1 of entities, or accuracy where the tags mark none."""
        return "f1" if self.entities else "accuracy"

    def read(self, record: Record, labelled: bool) -> Words:
        """The example of a record."""
        # a CoNLL file names no columns: its records have tokens and tags
        names = (self.options.tokens, self.options.tags)
        tokens, tags = (
            n if n in record.values else d for n, d in zip(names, ("tokens", "tags"), strict=True)
        )
        words = _strings(
            record.value(tokens if tokens in record.values else names[0]), tokens, record
        )
        if not labelled and record.values.get(tags) is None:
            return Words(words)
        found = _strings(record.value(tags if tags in record.values else names[1]), tags, record)
        if len(found) != len(words):
            raise ValueError(
                f"{record.place} has {len(words)} words and {len(found)} tags: give each word one"
            )
        return Words(words, found)

    def group(self, example: Words) -> Any:
        """Examples of one group are held out together: the same sentence twice is one."""
        return example.words

    def labels(self, example: Words) -> tuple[str, ...]:
        """The labels of an example."""
        return example.tags or ()

    def learn(self, examples: Sequence[Words]) -> None:
        """Take the tags from the training data; raises ValueError where there is nothing to tell apart."""
        found = {tag for e in examples for tag in e.tags or ()}
        if len(found) < 2:
            raise ValueError(
                f"the training data has one tag only, {listed(found)}: there is nothing to tell apart"
            )
        self.names = ordered(found)
        words = [word for e in examples for word in e.words]
        self.options = replace(self.options, characters=_in_characters(words))

    def encode(self, tokenizer: Any, examples: Sequence[Words]) -> Features:
        """Tokenise word by word; a sentence beyond max_length is cut between words into several sequences."""
        features = Features()
        numbers = {name: i for i, name in enumerate(self.names)}
        special = SpecialIds.of(tokenizer)
        if tokenizer.encode("").ids != [special.cls, special.sep]:
            raise ValueError(
                f"the tokenizer puts {tokenizer.encode('').tokens[:9]} around a text: tags need "
                f"{tokenizer.id_to_token(special.cls)} before and {tokenizer.id_to_token(special.sep)} after it"
            )
        room = self.options.max_length - 2
        pieces = _pieces(tokenizer, examples, special.unk)
        for i, example in enumerate(examples):
            parts = [pieces[word][:room] for word in example.words]
            features.cut += any(len(pieces[word]) > room for word in example.words)
            for words in _windows([len(p) for p in parts], room):
                ids = [special.cls, *(p for w in words for p in parts[w]), special.sep]
                lengths = [len(parts[w]) for w in words]
                firsts = 1 + np.cumsum([0, *lengths[:-1]])
                target: dict[str, Any] = {}
                if example.tags is not None:
                    labels = np.full(len(ids), -100, np.int64)
                    labels[firsts] = [numbers[example.tags[w]] for w in words]
                    target["labels"] = labels
                features.add(ids, [0] * len(ids), i, **target)
                features.places.append(firsts)
        return features

    def scores(self, output: Output, batch: Batch) -> list[Floats]:
        """The logits (S_i, K) of every sequence's tokens."""
        assert output.logits is not None
        bounds = batch["cu_seqlens"][1:-1].cpu().numpy()
        return np.split(output.logits.float().cpu().numpy(), bounds)

    def predictions(
        self, examples: Sequence[Words], features: Features, scores: Sequence[Floats]
    ) -> list[dict[str, Any]]:
        """The tag of every word, and the entities that the tags mark."""
        parts: list[list[Floats]] = [[] for _ in examples]
        for owner, firsts, logits in zip(features.owners, features.places, scores, strict=True):
            parts[owner].append(softmax(logits[firsts]))
        found = []
        for example, p in zip(examples, map(np.concatenate, parts), strict=True):
            tags = [self.names[k] for k in p.argmax(1)]
            prediction: dict[str, Any] = {"words": list(example.words), "tags": tags}
            if self.entities:
                prediction["entities"] = _entities(example, tags, p.max(1))
            found.append(prediction)
        return found

    def metrics(
        self, examples: Sequence[Words], predictions: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """Accuracy over words; precision, recall and F1 over whole entities, by seqeval as conlleval counts them."""
        true = [[_plain(t) for t in e.tags or ()] for e in examples]
        guessed = [[_plain(t) for t in p["tags"]] for p in predictions]
        pairs = [
            (a, b)
            for one, other in zip(true, guessed, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        values = {"accuracy": sum(a == b for a, b in pairs) / len(pairs)}
        if self.entities:
            report = seqeval().classification_report(
                true, guessed, output_dict=True, zero_division=0
            )
            micro = report.pop("micro avg")
            values |= {
                "precision": micro["precision"],
                "recall": micro["recall"],
                "f1": micro["f1-score"],
            }
            kinds = {k: v for k, v in report.items() if not k.endswith(" avg")}
            values |= {f"f1_{kind}": row["f1-score"] for kind, row in kinds.items()}
        return {name: float(value) for name, value in values.items()}

    def confusion(
        self, examples: Sequence[Words], predictions: Sequence[dict[str, Any]]
    ) -> tuple[list[str], NDArray[np.int64]]:
        """Kinds of entities (or tags), and counts of words (true, predicted)."""
        kind = (lambda tag: tag.partition("-")[2] or tag) if self.entities else str
        names = ordered({kind(name) for name in self.names})
        numbers = {name: i for i, name in enumerate(names)}
        true = [numbers[kind(t)] for e in examples for t in e.tags or ()]
        guessed = [numbers[kind(t)] for p in predictions for t in p["tags"]]
        return names, counts(true, guessed, len(names))


def _in_characters(words: Sequence[str]) -> bool:
    """Whether Chinese and Japanese words have one character each: at most one in 20 is longer."""
    lengths = [len(_CHARACTER.findall(word)) for word in words if _CHARACTER.match(word)]
    return 20 * sum(n > 1 for n in lengths) <= len(lengths)


def seqeval() -> Any:
    """The metrics of the package seqeval; raises ValueError where it is not installed."""
    try:
        from seqeval import metrics
    except ImportError as error:
        raise ValueError(
            "the package seqeval, which counts entities, is not installed: pip install seqeval"
        ) from error
    return metrics


def entity_spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(kind, first word, word after the last) of the entities in tags, read leniently as conlleval does."""
    kind, start = "", 0
    previous = "O"
    for i, tag in enumerate([*map(_plain, tags), "O"]):
        tag, _, name = tag.partition("-")
        # an entity ends before B, S and O, after E and S, and where the kind changes
        if kind and (tag in "BSO" or previous in "ES" or name != kind):
            yield kind, start, i
            kind = ""
        if tag != "O" and not kind:
            kind, start = name, i
        previous = tag


def _plain(tag: str) -> str:
    """The tag with E and S in the place of the other names of the same, L and U."""
    return tag[0].translate(_LAST_OR_ONLY) + tag[1:] if tag[1:2] == "-" else tag


def _entities(example: Words, tags: Sequence[str], p: Floats) -> list[dict[str, Any]]:
    found = []
    for kind, start, end in entity_spans(tags):
        entity: dict[str, Any] = {"type": kind, "words": _together(example, start, end)}
        if example.spans is not None:
            entity |= {"start": example.spans[start][0], "end": example.spans[end - 1][1]}
        else:
            entity |= {"first": start, "last": end - 1}
        found.append({**entity, "probability": float(p[start:end].mean())})
    return found


def _together(example: Words, start: int, end: int) -> str:
    """Some words with a blank between two, save where they touch each other in the text."""
    words = example.words[start:end]
    if example.spans is None:
        return " ".join(words)
    spans = example.spans[start:end]
    gaps = ["" if a[1] == b[0] else " " for a, b in pairwise(spans)]
    return "".join(map("".join, zip(words, [*gaps, ""], strict=True)))


def _strings(value: Any, name: str, record: Record) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{record.place}: {name} is {quoted(value)}: it must be a list of texts")
    found = tuple(str(v) if isinstance(v, int) else v for v in value)
    for number, each in enumerate(found):
        # not why_not_text: a word may be a blank of some kind, such as U+00A0
        reason = why_not_unicode(each) if isinstance(each, str) and each else f"is {quoted(each)}"
        if reason:
            raise ValueError(
                f"{record.place}: {name} holds something that is no text: number {number} {reason}"
            )
    return found


def _pieces(tokenizer: Any, examples: Sequence[Words], unk: int) -> dict[str, list[int]]:
    """The pieces of every word; one that the tokenizer drops, such as a control character, is unknown."""
    words = list({word: None for e in examples for word in e.words})
    # byte-level tokens of a word inside a sentence begin with the space before it
    space = " " if is_roberta(tokenizer) else ""
    encoded = tokenizer.encode_batch([space + word for word in words], add_special_tokens=False)
    return {word: e.ids or [unk] for word, e in zip(words, encoded, strict=True)}


def _windows(lengths: Sequence[int], room: int) -> Iterator[range]:
    """Ranges of words that fit together into `room` pieces."""
    start = used = 0
    for i, length in enumerate(lengths):
        if used + length > room:
            yield range(start, i)
            start, used = i, 0
        used += length
    yield range(start, len(lengths))
