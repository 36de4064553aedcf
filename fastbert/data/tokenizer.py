"""Tokenizers of BERT's and RoBERTa's kind: the ids of their special tokens, and how they are saved."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)

from fastbert.files import write_text

# in the order of their ids; RoBERTa's <mask> is the last id of the vocabulary
BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_TOKENS = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}


@dataclass(frozen=True)
class SpecialIds:
    """The ids of a tokenizer's special tokens; `all` also holds special tokens that have no role here, sorted."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    all: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialIds:
        """Find either family's names; raises ValueError that names the missing token."""
        names = ROBERTA_TOKENS if is_roberta(tokenizer) else BERT_TOKENS
        ids: dict[str, int] = {}
        for role, token in names.items():
            found = tokenizer.token_to_id(token)
            if found is None:
                raise ValueError(
                    f"the tokenizer has no {token} token: it needs {' '.join(BERT_TOKENS.values())}"
                    f" or {' '.join(ROBERTA_TOKENS.values())}"
                )
            ids[role] = found
        added = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        return cls(**ids, all=tuple(sorted(added | set(ids.values()))))


def is_roberta(tokenizer: Tokenizer) -> bool:
    """Whether the special tokens are RoBERTa's."""
    return tokenizer.token_to_id("[CLS]") is None and tokenizer.token_to_id("<s>") is not None


def wordpiece(vocab: dict[str, int], normalizer: Any) -> Tokenizer:
    """BERT's pieces and pre-tokeniser, without special tokens."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=BERT_TOKENS["unk"]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def finish_wordpiece(vocab: dict[str, int], normalizer: Any) -> Tokenizer:
    """BERT's tokenizer of a vocabulary: [CLS] a [SEP], or [CLS] a [SEP] b [SEP] with types 0 and 1."""
    tokenizer = wordpiece(vocab, normalizer)
    tokenizer.add_special_tokens([t for t in BERT_TOKENS.values() if t in vocab])
    return surround_wordpiece(tokenizer)


def surround_wordpiece(tokenizer: Tokenizer) -> Tokenizer:
    """Add BERT's [CLS] and [SEP] around texts and pairs, and the decoder."""
    ids = SpecialIds.of(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids.cls), ("[SEP]", ids.sep)],
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def finish_bpe(tokenizer: Tokenizer) -> Tokenizer:
    """RoBERTa's tokenizer of a BPE model: <s> a </s>, or <s> a </s></s> b </s>, all types 0."""
    *special, mask = ROBERTA_TOKENS.values()
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens([t for t in special if t in known])
    # a <mask> includes the space before it, as the tokens of words do
    tokenizer.add_special_tokens([AddedToken(mask, lstrip=True, special=True)])
    return surround_bpe(tokenizer)


def surround_bpe(
    tokenizer: Tokenizer, trim_offsets: bool = True, prefix_space: bool = False
) -> Tokenizer:
    """Add RoBERTa's <s> and </s> around texts and pairs, and the decoder."""
    ids = SpecialIds.of(tokenizer)
    # by place: the first two arguments have other names in other versions
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids.sep), ("<s>", ids.cls), trim_offsets, prefix_space
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A hash of everything that changes ids: padding and truncation don't count."""
    text = json.loads(tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()


def word_starts(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """(V,) whether a token begins a word: it has no ## (WordPiece), or it has a space before it (byte-level BPE)."""
    tokens = vocabulary(tokenizer)
    if isinstance(tokenizer.model, models.WordPiece):
        prefix = tokenizer.model.continuing_subword_prefix
        return np.array([not token.startswith(prefix) for token in tokens])
    return np.array([token.startswith(("Ġ", "▁")) for token in tokens])


def vocabulary(tokenizer: Tokenizer) -> list[str]:
    """The tokens by id; "" for an id without a token."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(ids.values()) + 1)
    for token, index in ids.items():
        tokens[index] = token
    return tokens


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, where transformers' AutoTokenizer finds them."""
    ids = SpecialIds.of(tokenizer)
    names = {f"{role}_token": tokenizer.id_to_token(getattr(ids, role)) for role in BERT_TOKENS}
    roberta = is_roberta(tokenizer)
    inputs = (
        ["input_ids", "attention_mask"]
        if roberta
        else ["input_ids", "token_type_ids", "attention_mask"]
    )
    config: dict[str, Any] = {
        # reads tokenizer.json as it is, where BertTokenizer would rebuild parts of it from options
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    if roberta:
        config |= {"bos_token": names["cls_token"], "eos_token": names["sep_token"]}
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    if normalizer.get("type") == "BertNormalizer":
        config["do_lower_case"] = normalizer["lowercase"]
        config["strip_accents"] = normalizer["strip_accents"]
        config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
    folder = Path(folder)
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
