"""Records of labelled data: .csv, .tsv, .jsonl, .json, CoNLL and .gz files, dicts, and Hugging Face `datasets`."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.files import (
    RECORDS,
    existing,
    listed,
    parse_json,
    quoted,
    read_text,
    shortened,
    split_lines,
    why_not_text,
)
from fastbert.finetune.conll import SUFFIXES as CONLL
from fastbert.finetune.conll import sentences

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
# the csv module has one limit for the whole process
_CSV_LIMIT = threading.Lock()


@dataclass(frozen=True)
class Record:
    """One row of a source; error messages name its `place`."""

    place: str
    values: Mapping[str, Any]

    def string(self, name: str) -> str:
        """The text in a field; raises ValueError where it is absent, no string or blank."""
        value = self.value(name)
        if reason := why_not_text(value):
            raise ValueError(f"{self.place}: {name} {reason}")
        return str(value)

    def value(self, name: str) -> Any:
        """The value of a field; raises ValueError, naming the fields of the record, where it is absent."""
        if name not in self.values:
            known = listed(self.values) or "none"
            raise ValueError(f"{self.place} has no field {quoted(name)}, only {known}")
        return self.values[name]


def read_records(source: Any, split: str = "train", conll: bool = False) -> list[Record]:
    """All records of a file, of a folder of `datasets`, of a data set of it, or of dicts.

    Of a data set with splits `split` is read; with `conll` text files hold a token a line. Raises FileNotFoundError,
    or ValueError naming the place and what is wrong there.
    """
    if not isinstance(source, (str, Path)):
        return _of_object(source, split)
    path = existing(source, RECORDS)
    if path.is_dir():
        return _of_folder(path, split)
    readers: dict[str, Callable[[str, str], Iterator[Record]]] = {
        ".csv": _csv,
        ".tsv": _tsv,
        ".jsonl": _jsonl,
        ".json": _json,
    }
    if conll:
        readers |= dict.fromkeys(CONLL, _conll)
    suffix = suffix_of(path)
    if suffix not in readers:
        raise ValueError(
            f"{path} ends in {quoted(suffix)}: labelled data here is {', '.join(readers)}, or one of these with .gz"
        )
    records = list(readers[suffix](read_text(path), str(path)))
    if not records:
        raise ValueError(f"{path} holds no record: it is empty or has a heading only")
    return records


def suffix_of(path: Path) -> str:
    """The suffix that says how a file is read: of a .gz the one before."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _csv(text: str, name: str) -> Iterator[Record]:
    """A heading, then a record a row; a quoted cell may hold line ends, and be of any length."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    with _CSV_LIMIT:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, len(text)))
        try:
            found = [(rows.line_num, row) for row in rows]
        except csv.Error as error:
            raise ValueError(f"{name}:{rows.line_num} is not CSV: {error}") from error
        finally:
            csv.field_size_limit(before)
    return _table(found, name, "quote texts that hold a separator")


def _tsv(text: str, name: str) -> Iterator[Record]:
    """A heading, then a record a line; there are no quotes."""
    lines = enumerate(split_lines(text), 1)
    rows = [(number, line.split("\t")) for number, line in lines if line]
    return _table(rows, name, "a text can't hold a tab")


def _table(rows: Sequence[tuple[int, list[str]]], name: str, remedy: str) -> Iterator[Record]:
    """The records of numbered rows, the first of them the heading; those without a cell are left out."""
    (first, heading), *rest = [(number, row) for number, row in rows if row] or [(1, [])]
    if len(set(heading)) < len(heading):
        raise ValueError(f"{name}:{first} names a column twice: {listed(heading)}")
    for number, row in rest:
        if len(row) != len(heading):
            raise ValueError(
                f"{name}:{number} has {len(row)} fields and the heading {len(heading)}: {remedy}"
            )
        yield Record(f"{name}:{number}", dict(zip(heading, row, strict=True)))


def _conll(text: str, name: str) -> Iterator[Record]:
    for number, values in sentences(split_lines(text), name):
        yield Record(f"{name}:{number}", values)


def _jsonl(text: str, name: str) -> Iterator[Record]:
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            place = f"{name}:{number}"
            yield Record(place, _object(_parsed(line, place), place))


def _json(text: str, name: str) -> Iterator[Record]:
    """A list of objects, or SQuAD's layout."""
    found = _parsed(text, name)
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        yield from _squad(found["data"], name)
        return
    if not isinstance(found, list):
        raise ValueError(f"{name} is neither a list of objects nor SQuAD's layout: use .jsonl")
    for number, value in enumerate(found):
        place = f"{name}, object {number}"
        yield Record(place, _object(value, place))


def _squad(articles: Sequence[Any], name: str) -> Iterator[Record]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    record = {**qa, "context": paragraph["context"]}
                    yield Record(f"{name}, question {shortened(str(qa['id']))}", record)
    except KeyError as error:
        raise ValueError(f"{name} is not in SQuAD's layout: {error} is missing") from error
    except TypeError as error:
        raise ValueError(f"{name} is not in SQuAD's layout: {error}") from error


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}): repair it") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is a {type(value).__name__}, not an object with fields")
    return value


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the package datasets wrote a folder."""
    return any((folder / f"dataset_{part}.json").is_file() for part in ("info", "dict"))


def _of_folder(path: Path, split: str) -> list[Record]:
    """A folder that `save_to_disk` of the package datasets wrote."""
    if not is_saved(path):
        raise ValueError(f"{path} is no folder that datasets' save_to_disk wrote: {RECORDS}")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{path} is a folder: pip install datasets to read what its save_to_disk wrote"
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is not whole: write it again by datasets' save_to_disk"
        ) from error
    return _of_object(found, split, str(path))


def _of_object(source: Any, split: str, name: str = "the data") -> list[Record]:
    """Of a Dataset, a dict of them by split, or a sequence of dicts; class numbers become names."""
    if isinstance(source, Mapping):
        if split not in source:
            raise ValueError(f"{name} has no split {quoted(split)}, only {listed(source)}")
        source, name = source[split], f"{name}[{split}]"
    classes = {
        column: names
        for column, feature in (getattr(source, "features", None) or {}).items()
        if (names := getattr(getattr(feature, "feature", feature), "names", None))
    }
    records = []
    for number, row in enumerate(source):
        place = f"{name}, row {number}"
        values = dict(_object(row, place))
        for column, names in classes.items():
            values[column] = _named(values[column], names)
        records.append(Record(place, values))
    if not records:
        raise ValueError(f"{name} holds no record")
    return records


def _named(value: Any, names: Sequence[str]) -> Any:
    """Class numbers as names; -1, which stands for a hidden label, becomes None."""
    if isinstance(value, (list, tuple)):
        return [_named(v, names) for v in value]
    return None if value is None or value < 0 else names[value]
