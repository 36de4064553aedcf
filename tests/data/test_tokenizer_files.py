"""Folders of tokenizers in every layout: the ids of transformers' AutoTokenizer, or a refusal whose one line helps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fastbert.data import load_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = "The the Film film s e E é a x1 x in 中 文 < > / [ ] . , john John".split()  # noqa: SIM905
VOCAB = [*SPECIAL, *WORDS, *("##" + w for w in WORDS)]
N = len(VOCAB)
MARKS = ["<x1>", "</x1>"]
TEXTS = st.lists(
    st.sampled_from(
        [
            *WORDS,
            *MARKS,
            "<X1>",
            "Films",
            "  ",
            "\n",
            "\u3000",
            "[MASK]",
            "<mask>",
            "É",
            "ﬁ",
            "\u00a0",
        ]
    )
    | st.text(max_size=4),
    max_size=8,
).flatmap(lambda parts: st.sampled_from(["", " "]).map(lambda glue: glue.join(parts)))


def entry(content: str, **flags: bool) -> dict[str, Any]:
    """A token as transformers writes it."""
    names = ("lstrip", "normalized", "rstrip", "single_word")
    return {"content": content, "special": True, **dict.fromkeys(names, False), **flags}


def wordpiece_json(lowercase: bool = True, **normalizer: Any) -> str:
    """BERT's tokenizer.json."""
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, **normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer.to_str()


def lowered(saved: str) -> str:
    """A tokenizer.json with Lowercase in front of its normaliser."""
    tokenizer = Tokenizer.from_str(saved)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    return tokenizer.to_str()


def bpe() -> Tokenizer:
    """RoBERTa's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=ROBERTA, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def unigram() -> Tokenizer:
    """XLM-RoBERTa's tokenizer, as transformers converts it from SentencePiece."""
    pieces = [*ROBERTA[:4], *("▁" + w for w in WORDS), *WORDS, "▁", "<mask>"]
    tokenizer = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=3))
    strip = normalizers.Strip(left=False, right=True)
    tokenizer.normalizer = normalizers.Sequence([strip, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([*ROBERTA[:4], AddedToken("<mask>", lstrip=True, special=True)])
    around = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=around
    )
    return tokenizer


def merges_files() -> dict[str, Any]:
    state = json.loads(bpe().to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    return {"vocab.json": state["vocab"], "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}


VOCAB_TXT = {"vocab.txt": "\n".join(VOCAB) + "\n"}
BERT = {"config.json": {"model_type": "bert"}}
LOWER, CASED = {"do_lower_case": True}, {"do_lower_case": False}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
ADDED = {t: N + i for i, t in enumerate(MARKS)}
DECODER = {"added_tokens_decoder": {str(i): entry(t) for t, i in ADDED.items()}}
LSTRIP = {"mask_token": entry("<mask>", lstrip=True)}
BPE_CONFIG = {"config.json": {"model_type": "roberta"}}


def slow(**settings: Any) -> dict[str, Any]:
    """A folder with vocab.txt."""
    return {**VOCAB_TXT, **BERT, "tokenizer_config.json": {**LOWER, **settings}}


def whole(lowercase: bool = True, **settings: Any) -> dict[str, Any]:
    """A folder with tokenizer.json."""
    named = {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase, **settings}
    return {**BERT, "tokenizer.json": wordpiece_json(lowercase), "tokenizer_config.json": named}


READ: dict[str, Callable[[], dict[str, Any]]] = {
    "vocab.txt": slow,
    "vocab.txt without capitals": lambda: {
        "vocab.txt": "\n".join([*SPECIAL, "the", "film", "##s", "e", "<", ">"]),
        **BERT,
    },
    "cased": lambda: slow(**CASED),
    "cased, accents stripped": lambda: slow(**CASED, strip_accents=True),
    "lower, accents kept": lambda: slow(strip_accents=False),
    "Chinese in words": lambda: slow(tokenize_chinese_chars=False),
    "slow settings": lambda: slow(do_basic_tokenize=False, never_split=["Film"]),
    "added_tokens.json": lambda: {**slow(), "added_tokens.json": ADDED},
    "added_tokens.json, special": lambda: {
        **slow(additional_special_tokens=MARKS),
        "added_tokens.json": ADDED,
    },
    "added_tokens.json, special in the map": lambda: {
        **slow(**CASED),
        "added_tokens.json": ADDED,
        "special_tokens_map.json": {"additional_special_tokens": MARKS},
    },
    "added_tokens_decoder": lambda: slow(**DECODER),
    "added_tokens_decoder, no special ones": lambda: slow(
        added_tokens_decoder={
            str(N): entry("<X1>", special=False, normalized=True),
            str(N + 1): entry("Films", special=False, single_word=True),
        }
    ),
    "special tokens without ids": lambda: slow(additional_special_tokens=MARKS),
    "extra_special_tokens": lambda: slow(extra_special_tokens={"mark": "<x1>"}),
    "another token's role": lambda: slow(bos_token="<x1>", image_token="</x1>"),
    "masks that take spaces": lambda: {
        **slow(),
        "special_tokens_map.json": {"mask_token": entry("[MASK]", lstrip=True)},
    },
    "DistilBERT": lambda: {**slow(), "config.json": {"model_type": "distilbert"}},
    "ELECTRA": lambda: {
        **slow(tokenizer_class="ElectraTokenizerFast"),
        "config.json": {"model_type": "electra"},
    },
    "DistilBERT's class": lambda: slow(tokenizer_class="DistilBertTokenizer"),
    "tokenizer.json": whole,
    "tokenizer.json, cased": lambda: whole(False),
    "tokenizer.json and another case": lambda: {**whole(), "tokenizer.json": wordpiece_json(False)},
    "tokenizer.json and other options": lambda: whole(
        strip_accents=False, tokenize_chinese_chars=False
    ),
    "tokenizer.json of sentence-transformers with do_lower_case": lambda: {
        **whole(),
        "tokenizer.json": lowered(wordpiece_json(False)),
    },
    "tokenizer.json of DistilBERT": lambda: whole(tokenizer_class="DistilBertTokenizerFast"),
    "tokenizer.json and added_tokens.json": lambda: {**whole(), "added_tokens.json": ADDED},
    "tokenizer.json and special tokens": lambda: whole(additional_special_tokens=MARKS),
    "tokenizer.json as it is": lambda: {**whole(**FAST), "tokenizer.json": wordpiece_json(False)},
    "tokenizer.json as it is, and more": lambda: {
        **whole(**FAST, additional_special_tokens=["</x1>"]),
        "added_tokens.json": {"<x1>": N},
    },
    "tokenizer.json alone": lambda: {"tokenizer.json": wordpiece_json(False)},
    "tokenizer.json of no model's class": lambda: {
        "tokenizer.json": wordpiece_json(False),
        "tokenizer_config.json": FAST,
    },
    "types none": lambda: whole(model_input_names=["input_ids", "attention_mask"]),
    "RoBERTa": lambda: {**BPE_CONFIG, **merges_files(), "special_tokens_map.json": LSTRIP},
    "RoBERTa with a space": lambda: {
        **BPE_CONFIG,
        **merges_files(),
        "special_tokens_map.json": LSTRIP,
        "tokenizer_config.json": {"add_prefix_space": True},
    },
    "RoBERTa's tokenizer.json": lambda: {**BPE_CONFIG, "tokenizer.json": bpe().to_str()},
    "RoBERTa's tokenizer.json with a space": lambda: {
        **BPE_CONFIG,
        "tokenizer.json": bpe().to_str(),
        "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True},
    },
    "RoBERTa's as it is": lambda: {
        **BPE_CONFIG,
        "tokenizer.json": bpe().to_str(),
        "tokenizer_config.json": {**FAST, "add_prefix_space": True},
    },
    "XLM-RoBERTa": lambda: {
        "config.json": {"model_type": "xlm-roberta"},
        "tokenizer.json": unigram().to_str(),
        "tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizerFast"},
    },
    "CamemBERT": lambda: {
        "config.json": {"model_type": "camembert"},
        "tokenizer.json": unigram().to_str(),
    },
}


def folder(path: Path, files: dict[str, Any]) -> Path:
    """Write the files, dicts as JSON."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name).write_text(text, encoding="utf-8")
    return path


def auto(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def same(ours: Tokenizer, theirs: Any, text: str, pair: str) -> None:
    assert ours.encode(text).ids == theirs(text)["input_ids"]
    both = theirs(text, pair)
    assert ours.encode(text, pair).ids == both["input_ids"]
    if "token_type_ids" in both:
        assert ours.encode(text, pair).type_ids == both["token_type_ids"]


@pytest.mark.parametrize("name", READ)
def test_ids_are_those_of_autotokenizer(name: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "t", READ[name]())
    ours, theirs = load_tokenizer(path), auto(path)
    same(ours, theirs, "The <x1> film</x1> Films [MASK] <mask> é 中文", "<X1>john")

    @settings(max_examples=60, deadline=None, database=None)
    @given(TEXTS, TEXTS)
    def compare(text: str, pair: str) -> None:
        same(ours, theirs, text, pair or "x")

    compare()


def broken(lowercase: bool = False, **parts: Any) -> dict[str, Any]:
    """A folder whose tokenizer.json has other parts than its class."""
    state = json.loads(wordpiece_json(lowercase))
    for name, change in parts.items():
        state[name] = change if not change or "type" in change else {**state[name], **change}
    return {**whole(lowercase), "tokenizer.json": state}


def spm() -> dict[str, Any]:
    return {"sentencepiece.bpe.model": "no model", "config.json": {"model_type": "xlm-roberta"}}


AROUND = {"type": "TemplateProcessing", "special_tokens": {}, "single": [], "pair": []}
LENGTH = {"max_input_chars_per_word": 5}
# the folder, the sentence, and whether its one line makes a folder that is read
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str, bool]] = {
    "capitals": (lambda: {**VOCAB_TXT, **BERT}, "does not say do_lower_case", False),
    "capitals in tokenizer.json": (
        lambda: {**BERT, "tokenizer.json": wordpiece_json(False)},
        "does not say do_lower_case",
        False,
    ),
    "gap": (
        lambda: {**slow(), "added_tokens.json": {"<x1>": N + 5}},
        f"do not agree on the added token '<x1>' of id {N + 5}",
        False,
    ),
    "other names": (lambda: slow(cls_token="<s>"), "cls_token is '<s>' and not", False),
    "Python's class": (
        lambda: slow(tokenizer_class="BertJapaneseTokenizer"),
        "a BertJapaneseTokenizer, which fastbert does not know",
        False,
    ),
    "unknown class": (
        lambda: {**whole(), "tokenizer_config.json": {"tokenizer_class": "Mine"}},
        "a Mine, which fastbert does not know",
        True,
    ),
    "unknown model": (
        lambda: {"tokenizer.json": wordpiece_json(), "config.json": {"model_type": "mpnet"}},
        "a tokenizer of mpnet, which",
        False,
    ),
    "no tokenizer.json": (lambda: slow(**FAST), "PreTrainedTokenizer needs one here", False),
    "BERT's files of RoBERTa": (
        lambda: {**VOCAB_TXT, **BPE_CONFIG},
        "RobertaTokenizer needs one here",
        False,
    ),
    "code of the folder": (
        lambda: whole(auto_map={"AutoTokenizer": [None, "mine.Mine"]}),
        "auto_map",
        False,
    ),
    "cut at the left": (lambda: whole(truncation_side="left"), "truncation_side", False),
    "special tokens are text": (lambda: whole(split_special_tokens=True), "split_special", False),
    "<mask>": (lambda: {**BPE_CONFIG, **merges_files()}, "says if <mask> includes", True),
    "other normaliser": (lambda: broken(normalizer={"clean_text": False}), "has parts", True),
    "no normaliser": (lambda: broken(normalizer=None), "has parts that its class", True),
    "other splits": (
        lambda: broken(pre_tokenizer={"type": "Whitespace"}),
        "has parts that its class, BertTokenizer, replaces",
        True,
    ),
    "other model": (lambda: broken(model=LENGTH), "has parts that its class", True),
    "other ends": (lambda: broken(post_processor=AROUND), "other tokens around a pair", True),
    "SentencePiece": (spm, "XLMRobertaTokenizer needs one here", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_folders_are_refused_and_the_one_line_helps(name: str, tmp_path: Path) -> None:
    make, sentence, helps = REFUSED[name]
    path = folder(tmp_path / "t", make())
    with pytest.raises(ValueError, match=re.escape(sentence)) as refusal:
        load_tokenizer(path)
    text = str(refusal.value)
    assert len(text) < 600
    assert str(path) in text
    if not helps:
        return
    code = re.search(r'python -c "(.*)"$', text)
    assert code is not None
    exec(code[1], {})
    ours, theirs = load_tokenizer(path), auto(path)
    same(ours, theirs, "The <x1> film [MASK] <mask> é 中文 Films", "<X1>john  x")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", {"do_lower_case": "yes"}),
        ("tokenizer_config.json", {"do_lower_case": None}),
        ("tokenizer_config.json", {**LOWER, "added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {**LOWER, "added_tokens_decoder": {"x": entry("a")}}),
        ("tokenizer_config.json", {**LOWER, "added_tokens_decoder": {str(N): {"content": 1}}}),
        ("tokenizer_config.json", {**LOWER, "additional_special_tokens": "x"}),
        ("tokenizer_config.json", {**LOWER, "model_input_names": 3}),
        ("tokenizer_config.json", {**LOWER, "bos_token": "\ud800"}),
        ("added_tokens.json", {"x": "y"}),
        ("added_tokens.json", {"x": -1}),
        ("special_tokens_map.json", {"cls_token": 5}),
        ("config.json", "{"),
    ],
)
def test_settings_that_can_not_be_are_named(name: str, content: Any, tmp_path: Path) -> None:
    path = folder(tmp_path / "t", {**slow(), name: content})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_tokenizer(path)


def test_a_template_with_tokens_that_are_not_there(tmp_path: Path) -> None:
    """The library ends the process's call by a panic, which no `except Exception` catches."""
    state = json.loads(unigram().to_str())
    state["post_processor"]["special_tokens"].pop("</s>")
    path = folder(tmp_path / "t", {"tokenizer.json": state})
    for place in (path, path / "tokenizer.json"):
        with pytest.raises(ValueError, match=r"has no ids for \['</s>'\] of its template"):
            load_tokenizer(place)


def test_no_transformers_is_needed(tmp_path: Path) -> None:
    """A folder is read, or refused, where transformers is not installed."""
    path = folder(tmp_path / "t", {**slow(), "added_tokens.json": ADDED})
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from fastbert.data import load_tokenizer\n"
        f"print(load_tokenizer({str(path)!r}).encode('<x1> film').tokens)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(["[CLS]", "<x1>", "film", "[SEP]"])
