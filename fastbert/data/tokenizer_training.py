"""Training a WordPiece (BERT) or byte-level BPE (RoBERTa) vocabulary."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from fastbert.data.corpus import Document
from fastbert.data.tokenizer import (
    BERT_TOKENS,
    ROBERTA_TOKENS,
    finish_bpe,
    finish_wordpiece,
    wordpiece,
)
from fastbert.files import quoted

# training takes quadratic time in the longest word; so many letters without a space are data and no word, except in
# scripts that put no spaces between words
_ENDLESS = re.compile(r"[^\W\u0e00-\u0eff\u2e80-\u9fff\uf900-\ufaff]{1000,}")


def train_tokenizer(
    documents: Iterable[Document | str],
    kind: str = "wordpiece",
    vocab_size: int = 30522,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese_chars: bool = True,
    min_frequency: int = 2,
    alphabet: int = 1000,
    progress: bool = False,
) -> Tokenizer:
    """Train "wordpiece" or "bpe" (byte-level) on documents, read twice; the same text gives the same vocabulary.

    `lowercase`, `strip_accents` (None: as lowercase), `chinese_chars` (spaces around them) and `alphabet` (the most
    characters to keep) are WordPiece's; byte-level BPE keeps every byte as it is. A small corpus may give fewer than
    `vocab_size` entries. Raises ValueError for no text, an unknown kind or a vocabulary too small for the alphabet.
    """
    if kind not in ("wordpiece", "bpe"):
        raise ValueError(f"the tokenizer kind is {quoted(kind)}: choose wordpiece or bpe")
    if iter(documents) is documents:
        raise TypeError("the documents can be read only once: pass a list or read_documents(...)")
    if min_frequency < 1 or alphabet < 1:
        raise ValueError(
            f"min_frequency {min_frequency} and alphabet {alphabet} must be at least 1"
        )
    if kind == "wordpiece":
        normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=chinese_chars,
            strip_accents=strip_accents,
            lowercase=lowercase,
        )
        return _train_wordpiece(
            documents, normalizer, vocab_size, min_frequency, alphabet, progress
        )
    return _train_bpe(documents, vocab_size, min_frequency, progress)


def _train_wordpiece(
    documents: Iterable[Document | str],
    normalizer: Any,
    vocab_size: int,
    min_frequency: int,
    alphabet: int,
    progress: bool,
) -> Tokenizer:
    special = list(BERT_TOKENS.values())
    first, inner = _characters(documents, normalizer, alphabet)
    _check_size(vocab_size, len(special) + len(first) + len(inner))
    tokenizer = wordpiece({}, normalizer)
    # the library numbers the ##characters in the order of a randomly seeded hash map and breaks ties between merges by
    # these numbers, so that two trainings differ; giving them beforehand makes the vocabulary a function of the text
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special + ["##" + c for c in inner],
        initial_alphabet=first,
        limit_alphabet=len(first),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_texts(documents), trainer)
    return finish_wordpiece(tokenizer.get_vocab(with_added_tokens=False), normalizer)


def _characters(
    documents: Iterable[Document | str], normalizer: Any, limit: int
) -> tuple[list[str], list[str]]:
    """The most frequent characters, and those of them that continue a word; both sorted."""
    words: Counter[str] = Counter()
    for text in _texts(documents):
        words.update(normalizer.normalize_str(text).split())
    if not words:
        raise ValueError("there is no text to train a tokenizer on")
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    first = sorted(ranked[:limit])
    pairs = {a + b for word in words for a, b in pairwise(word)}
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    inner = {both[1] for both in pairs if len(split(both)) == 1}
    return first, sorted(inner.intersection(first))


def _train_bpe(
    documents: Iterable[Document | str], vocab_size: int, min_frequency: int, progress: bool
) -> Tokenizer:
    # <mask> gets the last id, as in RoBERTa
    special = list(ROBERTA_TOKENS.values())[:-1]
    letters = pre_tokenizers.ByteLevel.alphabet()
    _check_size(vocab_size, len(special) + len(letters) + 1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=letters,
        show_progress=progress,
    )
    texts = _texts(documents)
    first = next(texts, None)
    if first is None:
        raise ValueError("there is no text to train a tokenizer on")
    tokenizer.train_from_iterator(_texts(documents), trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"][ROBERTA_TOKENS["mask"]] = len(state["model"]["vocab"])
    return finish_bpe(Tokenizer.from_str(json.dumps(state)))


def _check_size(vocab_size: int, least: int) -> None:
    if vocab_size < least:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the special tokens and the alphabet alone are {least}: raise it"
        )


def _texts(documents: Iterable[Document | str]) -> Iterator[str]:
    for document in documents:
        parts = document.paragraphs if isinstance(document, Document) else [document]
        yield from (_ENDLESS.sub(" ", part) for part in parts if part)
