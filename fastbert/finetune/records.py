"""Records of labelled data: .csv, .tsv, .jsonl, .json and CoNLL files, lists of dicts, and Hugging Face `datasets`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.files import RECORDS, existing

CONLL = (".conll", ".bio", ".iob", ".txt")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True)
class Record:
    """One row of a source; error messages name its `place`."""

    place: str
    values: Mapping[str, Any]

    def string(self, name: str) -> str:
        """The text in a field; raises ValueError where it is absent, no string or blank."""
        value = self.value(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.place}: {name} is {value!r}: it must be a text")
        return value

    def value(self, name: str) -> Any:
        """The value of a field; raises ValueError, naming the fields of the record, where it is absent."""
        if name not in self.values:
            known = ", ".join(map(str, self.values)) or "none"
            raise ValueError(f"{self.place} has no field {name!r}, only {known}")
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
        ".tsv": _csv,
        ".jsonl": _jsonl,
        ".json": _json,
    }
    if conll:
        readers |= dict.fromkeys(CONLL, _conll)
    if path.suffix not in readers:
        raise ValueError(
            f"{path} ends in {path.suffix!r}: labelled data here is {', '.join(readers)}"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it") from error
    records = list(readers[path.suffix](text, str(path)))
    if not records:
        raise ValueError(f"{path} holds no record: it is empty or has a heading only")
    return records


def _csv(text: str, name: str) -> Iterator[Record]:
    """A heading, then a record a row; .tsv has tabs and no quotes."""
    tabs = name.endswith(".tsv")
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, **form)
    try:
        heading = next(rows, [])
        if len(set(heading)) < len(heading):
            raise ValueError(f"{name}:1 names a column twice: {', '.join(heading)}")
        for row in rows:
            place = f"{name}:{rows.line_num}"
            if not row:
                continue
            if len(row) != len(heading):
                raise ValueError(
                    f"{place} has {len(row)} fields and the heading {len(heading)}: quote texts that hold a separator"
                )
            yield Record(place, dict(zip(heading, row, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{name}:{rows.line_num} is not CSV: {error}") from error


def _jsonl(text: str, name: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
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
                    yield Record(f"{name}, question {qa['id']}", record)
    except KeyError as error:
        raise ValueError(f"{name} is not in SQuAD's layout: {error} is missing") from error
    except TypeError as error:
        raise ValueError(f"{name} is not in SQuAD's layout: {error}") from error


def _conll(text: str, name: str) -> Iterator[Record]:
    """A token a line, its tag in the last column, a blank line between sentences; -DOCSTART- lines are left out."""
    tokens: list[str] = []
    tags: list[str] = []
    first, width = 1, 0
    for number, line in enumerate([*text.split("\n"), ""], 1):
        columns = line.rstrip("\r").split("\t") if "\t" in line else line.split()
        if not columns or columns[0] == "-DOCSTART-":
            if tokens:
                yield Record(f"{name}:{first}", _sentence(tokens, tags, width))
            tokens, tags = [], []
            continue
        width = width or len(columns)
        if len(columns) != width:
            raise ValueError(
                f"{name}:{number} has {len(columns)} columns and the lines before it {width}: repair it"
            )
        first = number if not tokens else first
        tokens.append(columns[0])
        tags.append(columns[-1])


def _sentence(tokens: list[str], tags: list[str], width: int) -> dict[str, Any]:
    return {"tokens": tokens, "tags": tags} if width > 1 else {"tokens": tokens}


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}): repair it") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is a {type(value).__name__}, not an object with fields")
    return value


def _of_folder(path: Path, split: str) -> list[Record]:
    """A folder that `save_to_disk` of the package datasets wrote."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{path} is a folder: pip install datasets to read what its save_to_disk wrote"
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is no folder that datasets' save_to_disk wrote") from error
    return _of_object(found, split, str(path))


def _of_object(source: Any, split: str, name: str = "the data") -> list[Record]:
    """Of a Dataset, a dict of them by split, or a sequence of dicts; class numbers become names."""
    if isinstance(source, Mapping):
        if split not in source:
            raise ValueError(f"{name} has no split {split!r}, only {', '.join(map(str, source))}")
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
