"""Documents from text files, folders, .jsonl, .gz, stdin and Hugging Face datasets."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from weakref import WeakKeyDictionary

from fastbert.data.sentences import split_sentences
from fastbert.files import (
    TEXTS,
    existing,
    lines_of,
    listed,
    parse_json,
    quoted,
    split_lines,
    unpacked,
)

SUFFIXES = (".txt", ".jsonl", ".gz")
# a file changed less than this before it was hashed may change again within the file system's clock tick
_SETTLED_NS = 2_000_000_000

Report = Callable[[int], None]  # called with the bytes read since the last call


@dataclass(frozen=True)
class Document:
    """One document: where it came from and its paragraphs, none of them empty."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The paragraphs with blank lines between them."""
        return "\n\n".join(self.paragraphs)

    def sentences(self) -> list[str]:
        """The sentences of all paragraphs, in order (`split_sentences`)."""
        return [s for paragraph in self.paragraphs for s in split_sentences(paragraph)]


@dataclass(frozen=True)
class Layout:
    """How a source's text is divided; part of what a shard folder's manifest records."""

    separator: str | None = None
    field: str = "text"


@dataclass(frozen=True)
class FileSource:
    """A text or .jsonl file, gzipped or not."""

    name: str
    path: Path
    kind: str  # "text" | "jsonl"
    keep: Any = field(default=None, compare=False, repr=False)  # keeps stdin's temporary copy alive

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def fingerprint(self) -> dict[str, Any]:
        """The file's kind, size and content hash, and its times where they prove that it is unchanged."""
        stamp = self.stamp()
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return {"name": self.name, "kind": self.kind, "sha256": digest.hexdigest(), "stamp": stamp}

    def stamp(self) -> list[Any] | None:
        """Size and times that identify unchanged content without reading it; None where they can't."""
        stat = self.path.stat()
        if self.keep is not None or time.time_ns() - stat.st_ctime_ns < _SETTLED_NS:
            return None
        return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]

    def documents(self, layout: Layout, report: Report) -> Iterator[Document]:
        with open(self.path, "rb") as raw, unpacked(raw, self.name) as stream:
            lines = self._reported(lines_of(stream, self.name), raw, report)
            if self.kind == "jsonl":
                yield from self._records(lines, layout)
            else:
                yield from _divide(lines, self.name, layout.separator)

    def _reported(self, lines: Iterator[str], raw: IO[bytes], report: Report) -> Iterator[str]:
        before = 0
        for number, line in enumerate(lines):
            yield line
            if number % 256 == 0:
                position = raw.tell()
                report(position - before)
                before = position
        report(self.size - before)

    def _records(self, lines: Iterator[str], layout: Layout) -> Iterator[Document]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{self.name}:{number}"
            try:
                record = parse_json(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{place} is not JSON ({error.msg}, column {error.colno}): write one object a line"
                ) from error
            except ValueError as error:
                # a number of more digits than Python reads, or deep nesting
                raise ValueError(f"{place} is not read ({error}): repair it") from error
            yield from _record(_field(record, layout.field, place), place)


@dataclass(frozen=True)
class DatasetSource:
    """A Hugging Face `datasets.Dataset` cut down to the one column that is read."""

    name: str
    dataset: Any

    @property
    def size(self) -> int:
        return int(self.dataset.data.nbytes)

    def fingerprint(self) -> dict[str, Any]:
        """The content hash of the column's texts."""
        digest = hashlib.sha256()
        for _, text in self._rows():
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return {"name": self.name, "kind": "dataset", "sha256": digest.hexdigest(), "stamp": None}

    def stamp(self) -> list[Any] | None:
        """None: only reading a data set shows that it is unchanged."""
        return None

    def documents(self, layout: Layout, report: Report) -> Iterator[Document]:
        share = self.size // max(1, len(self.dataset))
        for place, text in self._rows():
            yield from _record(text, place)
            report(share)

    def _rows(self) -> Iterator[tuple[str, str]]:
        row = 0
        for batch in self.dataset.with_format(None).iter(batch_size=1000):
            ((column, texts),) = batch.items()
            for text in texts:
                place = f"{self.name} row {row}"
                yield place, _field({column: text}, column, place)
                row += 1


Source = FileSource | DatasetSource


class Documents:
    """The documents of some sources; may be iterated any number of times, reading the sources anew each time."""

    def __init__(self, sources: Sequence[Source], layout: Layout) -> None:
        self.sources = tuple(sources)
        self.layout = layout

    @property
    def size(self) -> int:
        """Bytes in all the sources, as stored."""
        return sum(source.size for source in self.sources)

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def read(self, report: Report = lambda count: None) -> Iterator[Document]:
        """Iterate, calling `report` with the number of bytes just read; a source without any text is refused."""
        for source in self.sources:
            empty = True
            for document in source.documents(self.layout, report):
                empty = False
                yield document
            if empty:
                raise ValueError(f"{source.name} holds no text: leave it out")

    def fingerprints(self) -> list[dict[str, Any]]:
        """What identifies every source's content, in order."""
        return [source.fingerprint() for source in self.sources]


def read_documents(sources: Any, *, separator: str | None = None, field: str = "text") -> Documents:
    """Open `sources`: a path, "-" for stdin, a `datasets.Dataset`, or a sequence of these.

    A folder stands for its *.txt, *.jsonl and *.gz files, recursively and sorted. A line ends in LF, CRLF or CR. A text
    file is one document with blank lines between paragraphs, unless `separator` is given: then a line equal to it ends
    a document; "" means a blank line, as in BERT's original format, where every line is also a paragraph of its own. A
    .jsonl file or a dataset has one document per line or row, in `field`; those without text are skipped. Raises
    FileNotFoundError for a missing path, TypeError for another kind of source, and ValueError, naming file and place,
    for an empty or corrupt source; errors inside a file are found while iterating.
    """
    layout = Layout(None if separator is None else " ".join(separator.split()), field)
    items = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    found = [source for item in items for source in _expand(item, layout)]
    if not found:
        raise ValueError("no source is given: name a text file, a folder, or - for stdin")
    seen: set[Path] = set()
    for source in found:
        if isinstance(source, FileSource):
            path = source.path.resolve()
            if path in seen:
                raise ValueError(f"{source.name} is given twice: name it once")
            seen.add(path)
    return Documents(found, layout)


def _expand(item: Any, layout: Layout) -> list[Source]:
    if type(item).__module__.split(".")[0] == "datasets":
        return [_dataset(item, layout.field)]
    if not isinstance(item, (str, Path)):
        raise TypeError(
            f"a source is {type(item).__name__}: pass a path, - for stdin, or a datasets.Dataset"
        )
    if str(item) == "-":
        return [_stdin()]
    path = existing(item, TEXTS)
    return [_file(p) for p in (texts_in(path) if path.is_dir() else [path])]


def texts_in(folder: Path) -> list[Path]:
    """The files of text in a folder and below it, sorted; raises ValueError where there is none."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{folder} holds no {', '.join('*' + s for s in SUFFIXES)} file")
    return files


def _file(path: Path) -> FileSource:
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: pipe it in and pass - for stdin")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: leave it out")
    inner = path.with_suffix("") if path.suffix == ".gz" else path
    return FileSource(str(path), path, "jsonl" if inner.suffix == ".jsonl" else "text")


_STDIN: WeakKeyDictionary[Any, FileSource] = WeakKeyDictionary()


def _stdin() -> FileSource:
    """A copy of stdin on disk: the text is read more than once (tokenizer, hash, shards)."""
    if sys.stdin not in _STDIN:
        # closed and deleted with the source
        copy = tempfile.NamedTemporaryFile(prefix="fastbert-stdin-")  # noqa: SIM115
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        if copy.tell() == 0:
            raise ValueError("stdin is empty: pipe text into it")
        _STDIN[sys.stdin] = FileSource("stdin", Path(copy.name), "text", copy)
    return _STDIN[sys.stdin]


def _dataset(item: Any, column: str) -> DatasetSource:
    import datasets

    if not isinstance(item, datasets.Dataset):
        raise TypeError(
            f"a source is a datasets.{type(item).__name__}: pass one split that is on disk, such as dataset['train']"
        )
    if column not in item.column_names:
        raise ValueError(
            f"the dataset has no field {quoted(column)}, only {listed(item.column_names)}: set field"
        )
    if len(item) == 0:
        raise ValueError("the dataset has no rows: leave it out")
    # a change in another column leaves the fingerprint, and so the shards, as they are
    return DatasetSource("the dataset", item.select_columns([column]))


def _field(record: Any, name: str, place: str) -> str:
    """The text in field `name` of a record; raises ValueError that says what is there instead."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{place} is a JSON {type(record).__name__}, not an object with a field {quoted(name)}"
        )
    if name not in record:
        raise ValueError(
            f"{place} has no field {quoted(name)}, only {listed(record) or 'none'}: set field"
        )
    text = record[name]
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {quoted(name)} is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: field {quoted(name)} holds half a surrogate pair at {error.start}: repair it"
        ) from error
    return text


def _record(text: str, place: str) -> Iterator[Document]:
    return _divide(split_lines(text), place, None)


def _divide(lines: Any, name: str, separator: str | None) -> Iterator[Document]:
    """Documents of some lines; those without text are left out."""
    paragraphs: list[str] = []
    current: list[str] = []
    number = 0
    for line in lines:
        line = " ".join(line.split())
        if separator is not None and line == separator:
            _flush(current, paragraphs)
            if paragraphs:
                number += 1
                yield Document(f"{name}#{number}", tuple(paragraphs))
                paragraphs = []
        elif line and separator != "":
            current.append(line)
        else:
            _flush(current, paragraphs)
            paragraphs += [line] if line else []
    _flush(current, paragraphs)
    if paragraphs:
        yield Document(name if separator is None else f"{name}#{number + 1}", tuple(paragraphs))


def _flush(current: list[str], paragraphs: list[str]) -> None:
    if current:
        paragraphs.append(" ".join(current))
        current.clear()
