"""Tokenised documents on disk, memory-mapped: made once, opened at once, refused when sources or tokenizer changed."""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from tokenizers import Tokenizer

from fastbert.data import rng
from fastbert.data.corpus import Document, Documents, read_documents
from fastbert.data.sentences import RULES_VERSION
from fastbert.data.tokenizer import SpecialIds, tokenizer_hash, vocabulary
from fastbert.files import SHARDS, folder_or_new, parse_json, quoted, read_text

FORMAT = 1
MANIFEST = "manifest.json"
FILES = ("tokens.bin", "sentences.bin", "documents.bin")
# sentences encoded in one call: enough to keep all threads busy
_BATCH = 8192
_REMEDY = "rebuild it (rebuild=True, --rebuild) or delete the folder"


class ShardsError(ValueError):
    """A shard folder that is stale, truncated or corrupt; the message says which, and the remedy."""


class Shards:
    """An opened shard folder.

    `tokens` (N,) uint16 or uint32; `sentences` (S + 1,) int64 offsets into tokens; `documents` (D + 1,) int64 offsets
    into sentences; `manifest` says what they were made from.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        dtypes = (manifest["dtype"], "int64", "int64")
        self.tokens, self.sentences, self.documents = (
            np.memmap(folder / name, dtype, "r") for name, dtype in zip(FILES, dtypes, strict=True)
        )

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Shards:
        """Map a folder that `build_shards` made.

        `verify=False` skips the checksums, which read every byte. Raises FileNotFoundError without a manifest and
        ShardsError when the manifest or a file is damaged.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name in FILES:
            path, expected = folder / name, manifest["files"][name]
            size = path.stat().st_size if path.is_file() else -1
            if size != expected["bytes"]:
                found = f"has {size} bytes" if size >= 0 else "is missing"
                raise ShardsError(f"{path} {found}, expected {expected['bytes']}: {_REMEDY}")
            if verify and _crc32(path) != expected["crc32"]:
                raise ShardsError(f"{path} is corrupt (its checksum differs): {_REMEDY}")
        return cls(folder, manifest)

    def check(self, documents: Documents, tokenizer: Tokenizer) -> None:
        """Raise ShardsError, naming what differs, unless these documents and this tokenizer would give the same."""
        difference = _difference(self.manifest, documents, tokenizer)
        if difference:
            raise ShardsError(f"{self.folder} is stale, {difference}: {_REMEDY}")

    def split(
        self, fraction: float, seed: int, least: int = 1
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Document numbers (sorted int64) of the training and the held-out part.

        Held out are round(fraction * documents), at least `least` unless the fraction is 0; which ones is a function
        of the seed. Raises ValueError when fewer than `least` are left to train on.
        """
        count = len(self.documents) - 1
        heldout = max(least, round(fraction * count)) if fraction else 0
        if count - heldout < least:
            has = "1 document" if count == 1 else f"{count} documents"
            raise ValueError(
                f"{self.folder} has {has}, of which {heldout} would be held out: at least {least} must be left to "
                "train on; add documents, name the line between two of one file by separator ('' is a blank line), or "
                "lower heldout"
            )
        key = rng.derive(seed, rng.Purpose.HELD_OUT_DOCUMENTS)
        order = np.argsort(rng.bits(key, np.arange(count)), kind="stable")
        return np.sort(order[heldout:]), np.sort(order[:heldout])


def build_shards(
    sources: Any,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    separator: str | None = None,
    field: str = "text",
    rebuild: bool = False,
    progress: bool = False,
) -> Shards:
    """Tokenise `sources` (see `read_documents`; or its result) into `folder`, or open what is there and still fits.

    The folder appears whole or not at all: an interrupt leaves nothing. Raises ShardsError for a stale or damaged
    folder unless `rebuild`, ValueError for sources that can't be read and for a folder that holds other files.
    """
    documents = (
        sources
        if isinstance(sources, Documents)
        else read_documents(sources, separator=separator, field=field)
    )
    folder = folder_or_new(folder, SHARDS)
    SpecialIds.of(tokenizer)
    _sweep(folder)
    strangers = (
        [p.name for p in folder.iterdir() if p.name not in (*FILES, MANIFEST)]
        if folder.exists()
        else []
    )
    if strangers:
        raise ValueError(f"{folder} is no shard folder (it holds {strangers[0]}): choose another")
    if (folder / MANIFEST).exists() and not rebuild:
        shards = Shards.open(folder)
        shards.check(documents, tokenizer)
        return shards
    part = _beside(folder, "part")
    try:
        part.mkdir(parents=True)
        _write(part, documents, tokenizer, progress)
        _publish(part, folder, rebuild)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shards = Shards.open(folder, verify=False)
    # another process may have been first
    shards.check(documents, tokenizer)
    return shards


def _write(part: Path, documents: Documents, tokenizer: Tokenizer, progress: bool) -> None:
    size = len(vocabulary(tokenizer))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(tokenizer),
        "settings": _settings(documents),
        "sources": documents.fingerprints(),
        "dtype": "uint16" if size <= 1 << 16 else "uint32",
    }
    counts = {"documents": 0, "sentences": 0, "tokens": 0}
    with _Files(part) as files, Progress(disable=not progress) as bar:
        files.append("sentences.bin", np.zeros(1, np.int64))
        files.append("documents.bin", np.zeros(1, np.int64))
        task = bar.add_task("tokenising", total=documents.size)
        source = documents.read(lambda count: bar.advance(task, count))
        for tokens, sentences, ends in _encode(source, tokenizer):
            files.append("tokens.bin", tokens.astype(manifest["dtype"]))
            files.append("sentences.bin", counts["tokens"] + np.cumsum(sentences, dtype=np.int64))
            files.append("documents.bin", counts["sentences"] + np.cumsum(ends, dtype=np.int64))
            counts["tokens"] += len(tokens)
            counts["sentences"] += len(sentences)
            counts["documents"] += len(ends)
            bar.update(task, description=f"tokenising: {counts['tokens'] / 1e6:.1f} M tokens")
        manifest |= counts | {"files": files.table}
    if not counts["tokens"]:
        raise ValueError(
            "the tokenizer makes no token of the sources' text: it belongs to other text"
        )
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Batches of whole documents: tokens, the lengths of their sentences, the documents' numbers of sentences."""
    # a copy: special tokens that stand in the text are text, and nothing may be cut off
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    for batch in _batches(documents):
        texts = [text for document in batch for text in document]
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [e.ids for e in encoded]
        lengths = np.array([len(i) for i in ids], np.int64)
        owner = np.repeat(np.arange(len(batch)), [len(document) for document in batch])
        # sentences without a token and documents without a sentence are no examples of anything
        ends = np.bincount(owner[lengths > 0], minlength=len(batch))
        tokens = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))
        yield tokens, lengths[lengths > 0], ends[ends > 0]


def _batches(documents: Iterable[Document]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    size = 0
    for document in documents:
        first, *rest = document.sentences()
        # byte-level BPE knows a word within a text by the space before it; WordPiece ignores it
        batch.append([first, *(" " + sentence for sentence in rest)])
        size += len(rest) + 1
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Files:
    """The array files of a folder, appended to; `table` has their sizes and checksums."""

    def __init__(self, folder: Path) -> None:
        self._streams = {name: open(folder / name, "wb") for name in FILES}  # noqa: SIM115
        self.table = {name: {"bytes": 0, "crc32": 0} for name in FILES}

    def append(self, name: str, array: NDArray[Any]) -> None:
        data = array.tobytes()
        self._streams[name].write(data)
        entry = self.table[name]
        entry["bytes"] += len(data)
        entry["crc32"] = zlib.crc32(data, entry["crc32"])

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()


def _settings(documents: Documents) -> dict[str, Any]:
    layout = documents.layout
    return {"separator": layout.separator, "field": layout.field, "sentence rules": RULES_VERSION}


def _difference(manifest: dict[str, Any], documents: Documents, tokenizer: Tokenizer) -> str:
    """In words, the first thing that differs from what the manifest records; "" when nothing does."""
    if manifest["tokenizer"] != tokenizer_hash(tokenizer):
        return "the tokenizer has changed"
    for name, value in _settings(documents).items():
        if manifest["settings"][name] != value:
            return f"{name} is {quoted(value)} but was {quoted(manifest['settings'][name])}"
    old = manifest["sources"]
    if len(old) != len(documents.sources):
        return f"there are {len(documents.sources)} source files but were {len(old)}"
    for before, source in zip(old, documents.sources, strict=True):
        stamp = source.stamp()
        if stamp is not None and stamp == before["stamp"]:
            continue
        now = source.fingerprint()
        if (now["kind"], now["sha256"]) != (before["kind"], before["sha256"]):
            return f"the text of {source.name} has changed"
    return ""


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: build the shards first")
    try:
        manifest = parse_json(read_text(path))
        version = manifest["format"]
        files = manifest["files"]
        whole = (
            {"tokenizer", "settings", "sources"} <= manifest.keys()
            and manifest["dtype"] in ("uint16", "uint32")
            and files.keys() == set(FILES)
            and all({"bytes", "crc32"} <= each.keys() for each in files.values())
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ShardsError(f"{path} is damaged: {_REMEDY}") from None
    if version != FORMAT:
        raise ShardsError(f"{folder} has format {quoted(version)}, this is {FORMAT}: {_REMEDY}")
    if not whole:
        raise ShardsError(f"{path} is damaged: {_REMEDY}")
    return manifest


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _beside(folder: Path, purpose: str) -> Path:
    """A name for this process only, in the same file system, so that a rename is atomic."""
    return folder.absolute().with_name(
        f".{folder.absolute().name}.{purpose}-{socket.gethostname()}-{os.getpid()}"
    )


def _publish(part: Path, folder: Path, rebuild: bool) -> None:
    """Rename the finished folder into place; where another process was first, its folder stays."""
    old = _beside(folder, "old")
    if rebuild and folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove the folders of builds that were killed on this machine."""
    folder = folder.absolute()
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*-{socket.gethostname()}-*"):
        pid = leftover.name.rsplit("-", 1)[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
