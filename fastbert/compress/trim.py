"""Vocabulary trimming: the pieces that texts use, and the rows of a model's tables that belong to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastbert.data.tokenizer import SpecialIds
from fastbert.models.encoder import Pretrained
from fastbert.nn.int8 import Int8Embedding

Json = dict[str, Any]

# texts that are tokenised at once
_TEXTS = 1024


def trim(
    model: Pretrained, tokenizer: Tokenizer, texts: Iterable[str], min_count: int = 1
) -> Tokenizer:
    """Take the rows of pieces that the texts do not use out of a model; returns the tokenizer of the others.

    `model`, of fastbert.bert, is changed in place: word embeddings, floating-point or int8, a masked-LM decoder with
    its bias, and the ids in its config. `tokenizer` is WordPiece or Unigram and is not changed. A piece is kept that
    occurs `min_count` times, and so are special and added tokens, and the single characters of kept pieces, which spell
    other words of the same alphabet. Ids keep their order.

    The vector of a text whose pieces are all kept stays bitwise equal, as the tokenizer finds the same pieces:
    WordPiece takes the longest one, and Unigram the best sum of scores. An unknown character's score in Unigram is the
    lowest one minus 10, so that the piece with the lowest score is kept too. In WordPiece a word that was unknown may
    be spelled afterwards, by shorter pieces.

    Raises ValueError for other tokenizers, for one that does not fit the model, and for texts without such pieces.
    """
    if min_count < 1:
        raise ValueError(f"min_count is {min_count}: it must be at least 1")
    state: Json = json.loads(tokenizer.to_str())
    kind = state["model"]["type"]
    if kind not in ("WordPiece", "Unigram"):
        raise ValueError(
            f"the tokenizer is a {kind} one: trim takes WordPiece and Unigram, whose pieces need no other pieces"
        )
    ids, config = tokenizer.get_vocab(with_added_tokens=True), model.config
    if max(ids.values()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {max(ids.values())} and the model {config.vocab_size} rows of word "
            "embeddings: use the tokenizer that belongs to the model"
        )
    counts = _counts(tokenizer, texts, max(ids.values()) + 1)
    special = set(SpecialIds.of(tokenizer).all)
    used = {piece for piece, i in ids.items() if counts[i] >= min_count and i not in special}
    if not used:
        raise ValueError(f"no piece occurs {min_count} times in the texts: pass more of them")
    kept = {ids[piece] for piece in used | _characters(used, ids, state["model"])}
    kept |= _needed(state, ids) | special
    named = {i for _, i in _named_ids(config.extra)}
    kept |= {i for i in ids.values() if i in named or i == config.pad_token_id}
    if config.position_offset:
        # the positions of RoBERTa begin behind the padding's id, which stays the same
        kept |= set(range(config.position_offset))
    numbers = {old: new for new, old in enumerate(sorted(kept))}
    smaller = _renumbered(state, numbers)
    if smaller.get_vocab(with_added_tokens=True) != {
        piece: numbers[i] for piece, i in ids.items() if i in numbers
    }:
        raise ValueError(
            "the tokenizer has added tokens before pieces of its vocabulary, which would get other ids: save it anew, "
            "with the added tokens at the end"
        )
    _gather(model, torch.tensor(sorted(kept)), numbers)
    return smaller


def _counts(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> NDArray[np.int64]:
    """(size,) how often each id occurs in the texts, without the special tokens around them."""
    counts = np.zeros(size, np.int64)
    for encodings in _encoded(tokenizer, iter(texts)):
        for encoding in encodings:
            counts += np.bincount(encoding.ids, minlength=size)
    return counts


def _encoded(tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[Any]:
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_padding()
    whole.no_truncation()
    while some := [*islice(texts, _TEXTS)]:
        yield whole.encode_batch(some, add_special_tokens=False)


def _characters(used: set[str], ids: dict[str, int], model: Json) -> set[str]:
    """The pieces that are one character of the used ones, in WordPiece at a word's beginning and inside of it."""
    prefix = model.get("continuing_subword_prefix") or ""
    single = set("".join(piece.removeprefix(prefix) for piece in used))
    return {piece for c in single for piece in (c, prefix + c) if piece in ids}


def _needed(state: Json, ids: dict[str, int]) -> set[int]:
    """The ids that the tokenizer itself needs: added tokens, the unknown one, the padding's, the lowest score's."""
    model, padding = state["model"], state["padding"]
    found = {token["id"] for token in state["added_tokens"]}
    found |= set() if padding is None else {padding["pad_id"]}
    if model["type"] == "WordPiece":
        return found | {ids[token] for token in [model["unk_token"]] if token in ids}
    pieces = model["vocab"]
    found.add(min(range(len(pieces)), key=lambda i: pieces[i][1]))
    found |= set() if model["unk_id"] is None else {model["unk_id"]}
    if model.get("byte_fallback"):
        found |= {
            ids[piece] for piece in (f"<0x{byte:02X}>" for byte in range(256)) if piece in ids
        }
    return found


def _named_ids(extra: Json) -> Iterator[tuple[str, int]]:
    """(key, id) for the ids of tokens in a config.json, besides the padding's."""
    for key, value in extra.items():
        if key.endswith("_token_id") and type(value) is int:
            yield key, value


def _renumbered(state: Json, numbers: dict[int, int]) -> Tokenizer:
    """The tokenizer with these ids alone, under their new numbers."""
    model = dict(state["model"])
    if model["type"] == "WordPiece":
        model["vocab"] = {p: numbers[i] for p, i in model["vocab"].items() if i in numbers}
    else:
        model["vocab"] = [piece for i, piece in enumerate(model["vocab"]) if i in numbers]
        model["unk_id"] = numbers.get(model["unk_id"])
    added = [{**token, "id": numbers[token["id"]]} for token in state["added_tokens"]]
    padding = state["padding"] and {
        **state["padding"],
        "pad_id": numbers[state["padding"]["pad_id"]],
    }
    around = _around(state["post_processor"], numbers)
    changed = {"model": model, "added_tokens": added, "padding": padding, "post_processor": around}
    return Tokenizer.from_str(json.dumps(state | changed))


def _around(part: Any, numbers: dict[int, int]) -> Any:
    """A post-processor with new numbers: pairs of a token and its id in "cls" and "sep", or a template's "ids"."""
    if isinstance(part, list):
        return [_around(each, numbers) for each in part]
    if not isinstance(part, dict):
        return part
    found = {key: _around(value, numbers) for key, value in part.items()}
    for key in ("cls", "sep"):
        if key in part and part.get("type") in ("BertProcessing", "RobertaProcessing"):
            token, old = part[key]
            found[key] = [token, numbers[old]]
    if "ids" in part:
        found["ids"] = [numbers[old] for old in part["ids"]]
    return found


@torch.no_grad()
def _gather(model: Pretrained, kept: Tensor, numbers: dict[int, int]) -> None:
    """Keep these rows of the model's tables, and renumber the ids in its config."""

    def rows(p: Any) -> nn.Parameter:
        return nn.Parameter(p[kept.to(p.device)], requires_grad=p.requires_grad)

    config, word = model.config, model.bert.embeddings.word
    if config.pad_token_id is not None:
        # an id without a token means nothing afterwards
        config.pad_token_id = word.padding_idx = numbers.get(config.pad_token_id)
    if isinstance(word, Int8Embedding):
        places = kept.to(word.scale.device)
        word.hold(word.weight[places], word.scale[places])
    else:
        word.weight, word.num_embeddings = rows(word.weight), len(kept)
    head = getattr(model, "mlm_head", None)
    if head is not None:
        head.bias = None if head.bias is None else rows(head.bias)
        if head.decoder is not None:
            head.decoder.weight, head.decoder.out_features = rows(head.decoder.weight), len(kept)
    config.vocab_size = len(kept)
    for key, old in [*_named_ids(config.extra)]:
        config.extra[key] = numbers.get(old)
