"""Damaged files of every format that is read: a result or one sentence, whatever bytes are changed.

The default run tries few damages of each file; `make fuzz` tries many, with `--hypothesis-profile=fuzz`.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from fastbert.backend import tuned
from fastbert.bert import BertConfig, BertModel
from fastbert.cli.app import _is_expected
from fastbert.data.corpus import read_documents
from fastbert.data.images import read_image, to_patches
from fastbert.data.shards import Shards, build_shards
from fastbert.data.tokenizer import save_tokenizer, vocabulary
from fastbert.data.tokenizer_files import load_tokenizer
from fastbert.data.tokenizer_training import train_tokenizer
from fastbert.files import read_lines
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.records import read_records
from fastbert.integrations.fairseq import convert_fairseq_roberta
from fastbert.models.images import with_patches
from fastbert.models.two_towers import ImageTextConfig, TwoTowers
from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.pictures import Pictures, store_pictures
from fastbert.train.settings import load_settings
from fastbert.train.store import Checkpoints

LONGEST = 1000
TEXT = "The river runs to the sea.\r\nA line — with “quotes”, commas\tand tabs.\n\nThe end\n"
CONLL = "# sent_id = 1\nJohn NNP B-PER\nlives VBZ O\nin IN O\nParis NNP B-LOC\n\n-DOCSTART- -X- O\n\nHe PRP O\n"
TABLE = 'text,label\n"a ""quoted"" film, long",good\nshort,bad\n'
JSON = '{"text": "a film", "label": "good"}\n{"text": "b \\u2028 \\ud83d\\ude00", "label": 1}\n'
SQUAD = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "The river runs to the sea.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "Where to?",
                            "answers": [{"text": "the sea", "answer_start": 18}],
                        }
                    ],
                }
            ],
        }
    ]
}
SMALL = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
SETTINGS = {"lr": 1e-4, "sources": ["train.csv"], "epochs": 2, "seed": 7}


def written(name: str, content: str) -> Callable[[Path], Path]:
    """A maker of one file."""

    def make(folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return make


def model(name: str) -> Callable[[Path], Path]:
    """A maker of a model's folder, of which the file `name` is damaged."""

    def make(folder: Path) -> Path:
        small = BertModel(BertConfig(**SMALL))
        small.save_pretrained(folder)
        if name.endswith(".bin"):
            torch.save(load_file(folder / "model.safetensors"), folder / name)
            (folder / "model.safetensors").unlink()
        if name.endswith(".index.json"):
            (folder / "model.safetensors").rename(folder / "part.safetensors")
            names = {"weight_map": dict.fromkeys(small.state_dict(), "part.safetensors")}
            (folder / name).write_text(json.dumps(names))
        return folder / name

    return make


def tokenizer(name: str) -> Callable[[Path], Path]:
    """A maker of a tokenizer's folder, of which the file `name` is damaged."""

    def make(folder: Path) -> Path:
        made = train_tokenizer([TEXT], vocab_size=60, min_frequency=1)
        save_tokenizer(made, folder)
        if name == "vocab.txt":
            for other in folder.iterdir():
                other.unlink()
            (folder / name).write_text("\n".join(vocabulary(made)) + "\n")
        return folder / name

    return make


def shards(name: str) -> Callable[[Path], Path]:
    """A maker of a folder of tokenised text, of which the file `name` is damaged."""

    def make(folder: Path) -> Path:
        (folder / "a.txt").write_text(TEXT * 5)
        build_shards([folder / "a.txt"], train_tokenizer([TEXT], vocab_size=60), folder / "shards")
        return folder / "shards" / name

    return make


def fairseq(folder: Path) -> Path:
    """A file of torch.save with arguments in a Namespace, as fairseq writes it."""
    state = {"encoder.sentence_encoder.embed_tokens.weight": torch.zeros(9, 4)}
    torch.save({"model": state, "args": Namespace(encoder_layers=1)}, folder / "m.pt")
    return folder / "m.pt"


def checkpoint(folder: Path) -> Path:
    """A checkpoint of a run."""
    return Checkpoints(folder, 1).save(3, {"step": 3, "model": {"w": torch.ones(3)}})


def winners(folder: Path) -> Path:
    """What fastbert.tune() has found."""
    entry = {"op": "linear", "dtype": "float32", "few_rows": True, "sizes": [8], "backend": "cpu"}
    (folder / "tuned.json").write_text(json.dumps({tuned.cpu_name(): {"entries": [entry]}}))
    return folder / "tuned.json"


def read_winners(path: Path) -> Any:
    """The file in the folder of the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTBERT_CACHE", str(path.parent))
        return tuned.stored()


def image(name: str) -> Callable[[Path], Path]:
    """The maker of an image of 9 x 6 pixels."""

    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        return folder / name

    return make


def read_patches(path: Path) -> Any:
    return to_patches(read_image(path, 4, 8), 4)


def pictures(name: str) -> Callable[[Path], Path]:
    """The maker of a store of two images, of which a file is damaged."""

    def make(folder: Path) -> Path:
        for file in ("a.png", "b.png"):
            image(file)(folder)
        (folder / "captions.csv").write_text("file,caption\na.png,one\nb.png,two\n")
        store_pictures(folder / "images", str(folder), None, 4, 8)
        return folder / name

    return make


def towers(folder: Path) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    small = BertConfig(vocab_size=9, intermediate_size=4, max_position_embeddings=9, **sizes)
    TwoTowers(ImageTextConfig(small, with_patches(small, 2, 2), 4)).save_pretrained(folder)
    return folder / "config.json"


# name: (a maker of a good file, its reader)
FORMATS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "lines": (written("a.txt", TEXT), read_lines),
    "documents": (written("a.txt", TEXT), lambda p: list(read_documents([p]))),
    "csv": (written("a.csv", TABLE), read_records),
    "tsv": (written("a.tsv", "text\tlabel\na film, long\tgood\nb\tbad\n"), read_records),
    "jsonl": (written("a.jsonl", JSON), read_records),
    "json": (written("a.json", json.dumps(SQUAD)), read_records),
    "conll": (written("a.conll", CONLL), lambda p: read_records(p, conll=True)),
    "yaml": (written("a.yaml", json.dumps(SETTINGS)), lambda p: configured(p, FinetuneConfig)),
    "toml": (
        written("a.toml", PretrainConfig().to_toml()),
        lambda p: configured(p, PretrainConfig),
    ),
    "config.json": (model("config.json"), lambda p: BertConfig.from_file(p.parent)),
    "safetensors": (model("model.safetensors"), lambda p: BertModel.from_pretrained(p.parent)),
    "bin": (model("pytorch_model.bin"), lambda p: BertModel.from_pretrained(p.parent)),
    "index.json": (
        model("model.safetensors.index.json"),
        lambda p: BertModel.from_pretrained(p.parent),
    ),
    "tokenizer.json": (tokenizer("tokenizer.json"), lambda p: load_tokenizer(p.parent)),
    "tokenizer_config.json": (
        tokenizer("tokenizer_config.json"),
        lambda p: load_tokenizer(p.parent),
    ),
    "vocab.txt": (tokenizer("vocab.txt"), lambda p: load_tokenizer(p.parent)),
    "manifest": (shards("manifest.json"), lambda p: Shards.open(p.parent)),
    "tokens": (shards("tokens.bin"), lambda p: Shards.open(p.parent)),
    "fairseq": (fairseq, lambda p: convert_fairseq_roberta(p, p.parent / "out")),
    "checkpoint": (checkpoint, lambda p: Checkpoints(p.parent, 1).load()),
    "tuned.json": (winners, read_winners),
    **{
        name: (image(name), read_patches) for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.bmp")
    },
    "pictures": (pictures("images.json"), lambda p: Pictures(p.with_suffix(""))),
    "pixels": (pictures("images.bin"), lambda p: Pictures(p.with_suffix(""))),
    "two towers": (towers, lambda p: TwoTowers.from_pretrained(p.parent)),
}


def configured(path: Path, kind: Any) -> Any:
    """The settings of a file, as a command makes them."""
    return kind(**load_settings(path, kind))


# the pieces that damage a text in ways that random bytes seldom do
PIECES = st.sampled_from(
    [
        *(
            b"\0",
            b"\xff",
            b"\r",
            b"\n\n",
            b"\xef\xbb\xbf",
            b"\xed\xa0\x80",
            b"\xe2\x80\xa8",
            b"\xc2\x85",
        ),
        *(b"{", b"]", b'"', b"\t", b",", b": ", b"#", b"# a = b\n", b"&a *a", b"!!python/object:a"),
        *(b"1e999", b"NaN", b"null", b"-1", b"true", b"\\ud800", b"9" * 400),
        *(b"[" * 3000, b'{"a":' * 3000, b"a" * 3000, b"a " * 3000),
    ]
)
PLACE = st.floats(0, 1, exclude_max=True)
DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), PLACE, st.one_of(PIECES, st.binary(max_size=8))),
        st.tuples(st.just("overwrite"), PLACE, st.one_of(PIECES, st.binary(max_size=8))),
        st.tuples(st.just("delete"), PLACE, PLACE),
        st.tuples(st.just("cut"), PLACE, PLACE),
        st.tuples(st.just("repeat"), PLACE, PLACE),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, damage: list[tuple[str, float, Any]]) -> bytes:
    """The bytes after a list of damages; places and lengths are fractions of the length."""
    for kind, place, what in damage:
        at = int(place * len(content))
        if kind in ("insert", "overwrite"):
            content = content[:at] + what + content[at + len(what) * (kind == "overwrite") :]
            continue
        # short pieces, since long ones leave nothing to read
        end = at + max(1, math.ceil(what**3 * (len(content) - at)))
        if kind == "cut":
            content = content[:at]
        elif kind == "delete":
            content = content[:at] + content[end:]
        else:
            content = content[:end] + content[at:end] + content[end:]
    return content


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path_factory: Any) -> None:
    make, read = FORMATS[name]
    path = make(tmp_path_factory.mktemp("fuzz"))
    good = path.read_bytes()
    fuzzing = settings.get_current_profile_name() == "fuzz"

    @settings(
        max_examples=settings().max_examples if fuzzing else 25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @example([("insert", 0.5, b"[" * 100_000)])
    @example([("overwrite", 0.0, b'{"a":' * 100_000)])
    @given(DAMAGE)
    def try_damage(damage: Any) -> None:
        path.write_bytes(damaged(good, damage))
        sentence = refusal(read, path)
        assert sentence is None or 0 < len(sentence) < LONGEST

    # a whole model of fairseq would be slow to write
    assert name == "fairseq" or refusal(read, path) is None
    try_damage()


def refusal(read: Callable[[Path], Any], path: Path) -> str | None:
    """The message of an error that a command shows; None for a result. Other errors are raised."""
    try:
        read(path)
    except Exception as error:
        if not _is_expected(error):
            raise
        return str(error)
    return None
