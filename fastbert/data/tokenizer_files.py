"""The tokenizer of a folder, with the ids that transformers' AutoTokenizer gives there, or a refusal.

AutoTokenizer builds a tokenizer of the class that the folder names. The classes of BERT, RoBERTa and XLM-RoBERTa use
only the vocabulary of tokenizer.json and take all options from tokenizer_config.json; other classes use tokenizer.json
as it is. A folder that transformers 4 and 5 read in different ways is refused, save for the token types of pairs where
tokenizer_config.json names no model_input_names: transformers 5 gives none, and fastbert those of tokenizer.json, as 4.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fastbert.data.tokenizer import (
    ROBERTA_TOKENS,
    SpecialIds,
    surround_bpe,
    surround_wordpiece,
    wordpiece,
)
from fastbert.data.tokenizer_settings import Json, TokenizerFolder, flags_of, read
from fastbert.files import TOKENIZER_FILES, existing, quoted

# class without "Fast" -> model of the `tokenizers` library; None: tokenizer.json is used as it is
_MODELS: dict[str, str | None] = {
    "BertTokenizer": "WordPiece",
    "DistilBertTokenizer": "WordPiece",
    "ElectraTokenizer": "WordPiece",
    "RobertaTokenizer": "BPE",
    "XLMRobertaTokenizer": "Unigram",
    "CamembertTokenizer": "Unigram",
    "GPT2Tokenizer": None,
    "PreTrainedTokenizer": None,
    "TokenizersBackend": None,
}
# files of a vocabulary, the first of them is read -> the model that is built from it
_FILES = {
    "tokenizer.json": None,
    "vocab.txt": "WordPiece",
    "vocab.json": "BPE",
    "sentencepiece.bpe.model": None,
}
# settings of tokenizer_config.json that change ids and are not supported, with the values that change nothing
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "auto_map": (None,),
    "fast_tokenizer_files": (None,),
    "init_inputs": (None, []),
    "split_special_tokens": (None, False),
    "truncation_side": (None, "right"),
}


def load_tokenizer(path: str | Path, special: bool = True) -> Tokenizer:
    """Read the tokenizer of a folder, or a file: tokenizer.json as it is, vocab.txt, or vocab.json beside merges.txt.

    A folder's tokenizer gives the ids of transformers' AutoTokenizer. AutoTokenizer reads no vocab.txt without a
    config.json: it is lower-cased then unless a token has a capital letter or tokenizer_config.json says do_lower_case.
    Padding and truncation are off. Without `special` it may lack BERT's special tokens, as GPT-2's does. Raises
    FileNotFoundError, or ValueError that names the file and the remedy.
    """
    path = existing(path, TOKENIZER_FILES)
    file = (
        path if path.is_file() else next((path / n for n in _FILES if (path / n).is_file()), None)
    )
    if file is None:
        raise FileNotFoundError(
            f"{path} has none of {', '.join(list(_FILES)[:3])}: it holds no tokenizer"
        )
    if path.is_file() and file.suffix == ".json" and file.name != "vocab.json":
        tokenizer = _read_whole(file)
    else:
        tokenizer = _Folder(file).tokenizer()
    if special:
        SpecialIds.of(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_whole(file: Path) -> Tokenizer:
    """A tokenizer.json; the library panics at a template that names tokens which the file does not list."""
    tokenizer: Tokenizer = read(file, Tokenizer.from_file)
    around = _state(tokenizer)["post_processor"]
    for part in [] if around is None else _steps(around, "processors"):
        pieces = [*part.get("single", []), *part.get("pair", [])]
        named = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
        if absent := sorted(named - {*part.get("special_tokens", {})}):
            raise ValueError(
                f"{file} has no ids for {str(absent)[:100]} of its template: write it anew"
            )
    return tokenizer


class _Folder(TokenizerFolder):
    """Builds the tokenizer of a folder."""

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer; raises ValueError where AutoTokenizer might give other ids."""
        if self.name not in _MODELS:
            raise self.refused(f"its tokenizer is a {self.name}, which fastbert does not know")
        for name, harmless in _UNSUPPORTED.items():
            if self.settings.get(name) not in harmless:
                raise self.refused(
                    f"tokenizer_config.json has {name}, which fastbert does not apply"
                )
        model = _MODELS[self.name]
        if self.file.name == "tokenizer.json":
            tokenizer = _read_whole(self.file)
            if (tokenizer.truncation or {}).get("direction") == "left":
                raise self.refused("tokenizer.json cuts texts at the left, which fastbert does not")
            tokenizer.no_padding()
            tokenizer.no_truncation()
            self.saved = _state(tokenizer)
        elif _FILES.get(self.file.name, "WordPiece") != model:
            raise self.refused(f"it has no tokenizer.json, and {self.name} needs one here")
        if model is not None:
            if self.saved is not None:
                self.saved["normalizer"] = _without_lowercase(self.saved["normalizer"])
            build = {"WordPiece": self._wordpiece, "BPE": self._bpe, "Unigram": self._unigram}
            tokenizer = build[model]()
        self._add_tokens(tokenizer, model)
        if model is not None:
            self._surround(tokenizer, model)
        return self._with_types(tokenizer)

    def _check_parts(self, same: bool) -> None:
        if not same:
            raise self.refused(f"tokenizer.json has parts that its class, {self.name}, replaces")

    # what the classes build from a vocabulary

    def _wordpiece(self) -> Tokenizer:
        lower = None
        if self.saved is None:
            vocab = _read_vocab(self.file)
        else:
            model, normalizer = self.saved["model"], self.saved["normalizer"]
            options = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
            self._check_parts(
                _has(model, "WordPiece", **options)
                and _has(normalizer, "BertNormalizer", clean_text=True)
                and _has(self.saved["pre_tokenizer"], "BertPreTokenizer")
            )
            vocab, lower = model["vocab"], normalizer["lowercase"]
        if lower is None:
            lower = not any(t != t.lower() for t in vocab if not t.startswith("["))
        if self.named and "do_lower_case" not in self.settings and not lower:
            raise ValueError(
                f"{self.file} has capital letters and tokenizer_config.json does not say do_lower_case, so that "
                'transformers lower-cases the text: write {"do_lower_case": false} into tokenizer_config.json (or true)'
            )
        normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=bool(self.flag("tokenize_chinese_chars", True)),
            strip_accents=self.flag("strip_accents", None),
            lowercase=bool(self.flag("do_lower_case", lower)),
        )
        return wordpiece(vocab, normalizer)

    def _bpe(self) -> Tokenizer:
        if self.saved is None:
            merges = self.file.with_name("merges.txt")
            if not merges.is_file():
                raise FileNotFoundError(
                    f"{merges} does not exist: {self.file.name} needs it beside it"
                )
            model = read(self.file, lambda name: models.BPE.from_file(name, str(merges)))
            tokenizer = Tokenizer(model)
        else:
            options = (
                *("dropout", "continuing_subword_prefix", "end_of_word_suffix"),
                *("fuse_unk", "byte_fallback", "ignore_merges"),
            )
            self._check_parts(
                _has(self.saved["model"], "BPE")
                and not any(self.saved["model"].get(option) for option in options)
                and _has(self.saved["pre_tokenizer"], "ByteLevel", use_regex=True)
                and self.saved["normalizer"] is None
            )
            tokenizer = _tokenizer(self.saved | {"added_tokens": []})
        space = bool(self.flag("add_prefix_space", False))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
        return tokenizer

    def _unigram(self) -> Tokenizer:
        assert self.saved is not None
        model = self.saved["model"]
        normalizer = _steps(self.saved["normalizer"], "normalizers")
        *splits, last = _steps(self.saved["pre_tokenizer"], "pretokenizers") or [{}]
        self._check_parts(
            _has(model, "Unigram", byte_fallback=False)
            and model["vocab"][model["unk_id"] or 0][0] == ROBERTA_TOKENS["unk"]
            and {step["type"] for step in normalizer} <= {"Precompiled", "Strip", "Replace"}
            and _has(last, "Metaspace", replacement="▁")
            and all(_has(split, "WhitespaceSplit") for split in splits)
        )
        kept = next((step for step in normalizer if step["type"] == "Precompiled"), None)
        tokenizer = _tokenizer(self.saved | {"added_tokens": [], "normalizer": kept})
        scheme = "always" if self.flag("add_prefix_space", True) else "never"
        space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
        return tokenizer

    # the tokens that were added to a vocabulary

    def _add_tokens(self, tokenizer: Tokenizer, model: str | None) -> None:
        """Add the tokens that the files list by id, then the special ones, in transformers' order."""
        saved = self.saved_tokens()
        listed = self.listed_tokens(saved)
        tokenizer.add_tokens([listed[index] for index in sorted(listed)])
        if model is not None:
            SpecialIds.of(tokenizer)
        by_text = {str(token.content): token for token in listed.values()}
        special = self.special_tokens(tokenizer, model)
        own = [v for k, v in self.settings.items() if k.endswith("_token") and isinstance(v, str)]
        given = [
            self.token(token, special=True) for token in (*special, *self.extra, *self.more, *own)
        ]
        known = {str(t.content) for t in tokenizer.get_added_tokens_decoder().values()}
        tokens = [by_text.get(str(t.content), t) for t in given if str(t.content) not in known]
        tokenizer.add_tokens(tokens)
        built = {i: flags_of(t) for i, t in tokenizer.get_added_tokens_decoder().items()}
        for index, token in (*listed.items(), *saved.items()):
            if built.get(index) != flags_of(token):
                raise self.refused(
                    f"its files do not agree on the added token {quoted(str(token.content))} of id {index}"
                )

    # what stands around a text

    def _surround(self, tokenizer: Tokenizer, model: str) -> None:
        if model == "WordPiece":
            surround_wordpiece(tokenizer)
        elif model == "BPE":
            space = bool(self.flag("add_prefix_space", False))
            surround_bpe(tokenizer, bool(self.flag("trim_offsets", True)), space)
        ids = SpecialIds.of(tokenizer)
        wanted = [ids.cls, *[ids.sep] * (2 if model == "WordPiece" else 3)]
        old = tokenizer if self.saved is None else _tokenizer(self.saved)
        if old.encode("", "").ids != wanted or tokenizer.encode("", "").ids != wanted:
            raise self.refused(f"tokenizer.json puts other tokens around a pair than {self.name}")

    def _with_types(self, tokenizer: Tokenizer) -> Tokenizer:
        """All token types are 0 where the folder's inputs have none."""
        silent = [] if self.name == "DistilBertTokenizer" else ["token_type_ids"]
        inputs = self.settings.get("model_input_names") or silent
        if not isinstance(inputs, list):
            raise ValueError(f"{self.path}: model_input_names is {quoted(inputs)}: make it a list")
        if "token_type_ids" in inputs:
            return tokenizer
        state = _state(tokenizer)
        _clear_types(state["post_processor"])
        return _tokenizer(state)


def _read_vocab(file: Path) -> dict[str, int]:
    """The ids of a vocab.txt, one token a line; a repeated token is refused."""
    text: str = read(file, lambda name: Path(name).read_bytes().decode("utf-8-sig"))
    lines = text.split("\n")
    vocab: dict[str, int] = {}
    for index, line in enumerate(lines if lines[-1] else lines[:-1]):
        token = line.rstrip()
        if token in vocab:
            raise ValueError(
                f"{file}:{index + 1} repeats {quoted(token)} of line {vocab[token] + 1}: ids would shift"
            )
        vocab[token] = index
    return vocab


def _state(tokenizer: Tokenizer) -> Json:
    state: Json = json.loads(tokenizer.to_str())
    return state


def _tokenizer(state: Json) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(state))
    except Exception as error:
        raise ValueError(
            f"tokenizer.json contradicts itself ({str(error)[:200]}): copy it again"
        ) from error


def _has(part: Json | None, kind: str, **values: Any) -> bool:
    """Whether a part of tokenizer.json is of a kind, with these values."""
    return (
        part is not None
        and part.get("type") == kind
        and all(part.get(name) == value for name, value in values.items())
    )


def _without_lowercase(normalizer: Any) -> Any:
    """A normalizer without a Lowercase in front: sentence-transformers adds it, and the classes leave it out."""
    steps = _steps(normalizer, "normalizers")
    if not steps or not _has(steps[0], "Lowercase"):
        return normalizer
    rest = steps[1:]
    if len(rest) > 1:
        return {"type": "Sequence", "normalizers": rest}
    return rest[0] if rest else None


def _steps(part: Json | None, name: str) -> list[Json]:
    """The steps of a normaliser or pre-tokeniser, which may be a sequence of them."""
    if part is None:
        return []
    return part[name] if part["type"] == "Sequence" else [part]


def _clear_types(part: Any) -> None:
    """Set every token type in a post-processor's state to 0."""
    if isinstance(part, dict):
        part.update({name: 0 for name in part if name == "type_id"})
    for value in (
        part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    ):
        _clear_types(value)
