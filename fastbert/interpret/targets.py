"""Targets: a class, a tag, the ends of an answer, a word behind [MASK], the similarity of two texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.files import listed, quoted
from fastbert.finetune.classify import scale_of
from fastbert.integrations.sentence_transformers import pool
from fastbert.interpret.question import Target
from fastbert.models.inputs import prepare
from fastbert.nn.int8 import Int8Embedding


def class_target(model: Any, k: int, probability: bool = False) -> Target:
    """The logit, or the probability, of class k of a classifier of whole texts."""
    name = _class(model, k)
    scale = scale_of(model.config) if probability else "none"
    places = {"mean": (), "cls": (0,), "last": (-1,)}[model.config.classifier_pooling]

    def score(model: Any, given: dict[str, Any], rows: Tensor) -> Tensor:
        return _of(model(**given).logits, k, scale)

    return Target(name, score, places)


def tag_target(model: Any, place: int, k: int, probability: bool = False) -> Target:
    """The logit, or the probability, of tag k at a token."""

    def score(model: Any, given: dict[str, Any], rows: Tensor) -> Tensor:
        return _of(model(**given).logits[rows[:, 0]], k, "softmax" if probability else "none")

    return Target(_class(model, k), score, (place,))


def answer_target(start: int | None, end: int | None) -> Target:
    """The score of an answer's first token as its start, of its last as its end, or the sum of both."""
    if start is None and end is None:
        raise ValueError("start and end are both None: pass the token of one of them")

    def score(model: Any, given: dict[str, Any], rows: Tensor) -> Tensor:
        output = model(**given)
        parts = []
        if start is not None:
            parts.append(output.start_logits[rows[:, 0]])
        if end is not None:
            parts.append(output.end_logits[rows[:, -1]])
        return sum(parts[1:], parts[0])

    places = tuple(p for p in (start, end) if p is not None)
    names = {(False, True): "end", (True, False): "start", (True, True): "span"}
    return Target(names[start is not None, end is not None], score, places)


def word_target(model: Any, place: int, k: int, name: str, probability: bool = False) -> Target:
    """The logit, or the probability, of token k at a token, such as [MASK], of a masked LM."""
    _check(k, model.config.vocab_size, "token")

    def score(model: Any, given: dict[str, Any], rows: Tensor) -> Tensor:
        # the decoder runs for these rows alone
        e = model.bert.encode(prepare(model.config, **given), rows[:, 0])
        table = model.bert.embeddings.word
        word = table if isinstance(table, Int8Embedding) else table.weight
        return _of(model.mlm_head(e.x, word), k, "softmax" if probability else "none")

    return Target(name, score, (place,))


def similarity_target(
    ids: Tensor,  # (S,) of both texts, laid end to end
    lengths: tuple[int, int],
    pooling: Sequence[str] = ("mean",),
    skipped: int = 0,
    layers: Any = None,
) -> Target:
    """The cosine of the vectors of two texts, pooled as a sentence encoder does; `layers` follow the pooling.

    Each text is compared with the other one as it is: cos(u', v) + cos(u, v') - cos(u, v), where u' and v' are what is
    left of u and v. Two texts without words are the same, so that cos(u', v') grows as words go.
    """
    whole = {
        "input_ids": ids,
        "token_type_ids": torch.zeros_like(ids),
        "cu_seqlens": torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }

    def vectors(model: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        hidden = model.bert.encode(prepare(model.config, **given)).x.float()
        found = pool(hidden, given["cu_seqlens"].long().diff(), pooling, skipped)
        found = found if layers is None else layers(found)
        first, second = found.unflatten(0, (-1, 2)).unbind(1)
        return first, second

    def score(model: Any, given: dict[str, Any], rows: Tensor) -> Tensor:
        device = model.device
        with torch.no_grad():
            u, v = vectors(
                model, {k: t.to(device) if isinstance(t, Tensor) else t for k, t in whole.items()}
            )
        first, second = vectors(model, given)
        cosine = torch.cosine_similarity
        return cosine(first, v) + cosine(u, second) - cosine(u, v)

    return Target("similarity", score, ())


def _of(logits: Tensor, k: int, scale: str) -> Tensor:
    """Column k of logits (N, K), with `scale` softmax or sigmoid as a probability."""
    scaled = {"none": lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1)}
    return scaled[scale](logits.float())[:, k]


def _class(model: Any, k: int) -> str:
    names = model.config.labels
    _check(k, len(names) or model.config.num_labels or 1, f"class of {listed(names)}")
    return names[k] if k < len(names) else str(k)


def _check(k: int, count: int, what: str) -> None:
    if not 0 <= k < count:
        raise ValueError(f"the target {k} is no {what}: pass a number from 0 to {count - 1}")


def class_number(names: Sequence[str], target: str | int) -> int:
    """The number of a class by its name or number."""
    if isinstance(target, int):
        return target
    if target in names:
        return list(names).index(target)
    if target.isdecimal() and int(target) < len(names):
        return int(target)
    raise ValueError(
        f"the target {quoted(target)} is no class of the model: it has {listed(names)}"
    )
