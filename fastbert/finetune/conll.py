"""CoNLL files: a word a line, its tag in the last column, a blank line between sentences.

Columns are separated by tabs, or by blanks in a line without tabs; no other character separates them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.files import decoded, quoted, split_lines

SUFFIXES = (".conll", ".conllu", ".bio", ".iob", ".txt", ".tsv")
_DOCUMENT = "-DOCSTART-"
# `# text = ...` of CoNLL-U and others, `# id ... domain=en` of MultiCoNER
_COMMENT = re.compile(r"#\s*\S+\s*=\s|#\s*id\s+\S+\s+\S+=")
# a word, a range of words (1-2) or an empty node (1.1) of CoNLL-U
_NUMBER = re.compile(r"\d+(?:[-.]\d+)?")
_CONLL_U_COLUMNS, _GERMEVAL_COLUMNS = 10, 4


@dataclass(frozen=True)
class _Row:
    number: int
    line: str
    columns: tuple[str, ...]
    # whether the line begins with # and stands before the first word of a sentence
    leading: bool


def sentences(lines: Sequence[str], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the first line, {"tokens": ..., "tags": ...}) of every sentence.

    There are no tags where there is one column, or where all tags are _. Comments and -DOCSTART- lines are left out.
    Of CoNLL-U the columns FORM and UPOS are read, of GermEval 2014 the outer tags. Raises ValueError that names the
    line for everything else.
    """
    rows = _rows(lines)
    tags = {row.columns[-1] for row in rows if row.columns and not row.leading}
    filled = sorted((row for row in rows if row.columns), key=lambda row: row.leading)
    width = len(filled[0].columns) if filled else 0
    comments = {row.number for row in rows if row.leading and _is_comment(row, width, tags)}
    found = [row for row in rows if row.number not in comments]
    for row in found:
        if reason := _why_not_row(row, width):
            raise ValueError(f"{name}:{row.number} {reason}")
    germeval = any(row.line.startswith("#\t") for row in rows if row.number in comments)
    word, tag = _places(found, width, germeval, name)
    tagged = width > 1 and any(row.columns[tag] != "_" for row in found if row.columns)
    for sentence in _sentences(found):
        # CoNLL-U gives tags to words, and none to ranges of them and to empty nodes
        members = [row for row in sentence if word == 0 or row.columns[0].isdecimal()]
        values = {"tokens": [row.columns[word] for row in members]}
        if tagged:
            values["tags"] = [row.columns[tag] for row in members]
        empty = next((row.number for row in members if not row.columns[word]), None)
        if empty is not None:
            raise ValueError(f"{name}:{empty} has no word in column {word + 1}: repair it")
        if members:
            yield members[0].number, values


def encoded(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> str:
    """The content of a CoNLL file of sentences, (words, tags) each.

    Raises ValueError where it would be read back as other words or tags.
    """
    for separator in " \t":
        text = _joined(pairs, separator)
        if _reads_as(text, pairs):
            return text
    for number, (words, tags) in enumerate(pairs, 1):
        for pair in zip(words, tags, strict=True):
            # beside a plain word, so that a # or a number is no matter of its sentence alone
            one = [(("x", pair[0]), (pair[1], pair[1]))]
            if not any(_reads_as(_joined(one, separator), one) for separator in " \t"):
                raise ValueError(
                    f"a CoNLL file can't hold the word {quoted(pair[0])} of sentence {number} with the tag "
                    f"{quoted(pair[1])}: choose .jsonl or .csv"
                )
    raise ValueError(
        "a CoNLL file of these words would read back as other words: choose .jsonl or .csv"
    )


def _rows(lines: Sequence[str]) -> list[_Row]:
    """All lines; a blank line and a line of -DOCSTART- have no columns."""
    rows = []
    inside = False
    for number, line in enumerate(lines, 1):
        bare = line.rstrip(" \t").lstrip(" ")
        columns = [c.strip(" ") for c in bare.split("\t")] if "\t" in bare else bare.split(" ")
        # several blanks separate columns as one does
        columns = columns if "\t" in bare else [c for c in columns if c]
        if columns[:1] == [_DOCUMENT]:
            columns = []
        leading = bare.startswith("#") and not inside
        rows.append(_Row(number, bare, tuple(columns), leading))
        inside = bool(columns) and not leading
    return rows


def _is_comment(row: _Row, width: int, tags: set[str]) -> bool:
    """Whether a line that begins with # before a sentence is a comment, and not the word # or #word with its tag."""
    if _COMMENT.match(row.line):
        return True
    if row.columns[0] != "#" and not row.line.startswith("##"):
        return False
    if "\t" in row.line and len(row.columns) == width:
        return False
    # a tag that no other line has, save of the word # that is tagged as #
    return len(row.columns) != width or not tags.union("#").issuperset(row.columns[-1:])


def _why_not_row(row: _Row, width: int) -> str | None:
    """Why a line is not read, as the end of a sentence."""
    if not row.columns:
        return None
    if row.columns[0] == "#begin":
        return "is a line of CoNLL-2012 (OntoNotes), which is not read: write a word and its tag a line"
    if _COMMENT.match(row.line):
        return f"is a comment inside a sentence, {quoted(row.line)}: put a blank line before it"
    if len(row.columns) != width:
        hint = ", or begin a comment with a # and a blank" if row.line.startswith("#") else ""
        return f"has {len(row.columns)} columns and the lines before it {width}: repair it{hint}"
    return None


def _places(rows: Sequence[_Row], width: int, germeval: bool, name: str) -> tuple[int, int]:
    """The columns of the word and of its tag; raises ValueError for a layout with numbered words that is unknown."""
    words = [row.columns[0] for row in rows if row.columns]
    if width < 3 or len(words) < 2 or words[0] not in ("0", "1", "1-2"):
        return 0, width - 1
    if not all(map(_NUMBER.fullmatch, words)):
        return 0, width - 1
    if width == _CONLL_U_COLUMNS:
        return 1, 3
    if width == _GERMEVAL_COLUMNS and germeval:
        return 1, 2
    raise ValueError(
        f"{name} has numbers in its first column and is neither CoNLL-U nor GermEval: leave that column out"
    )


def _sentences(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    sentence: list[_Row] = []
    for row in rows:
        if row.columns:
            sentence.append(row)
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _joined(pairs: Sequence[tuple[Sequence[str], Sequence[str]]], separator: str) -> str:
    return "\n".join(
        "".join(f"{word}{separator}{tag}\n" for word, tag in zip(words, tags, strict=True))
        for words, tags in pairs
    )


def _reads_as(text: str, pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> bool:
    try:
        found = [values for _, values in sentences(split_lines(decoded(text.encode(), "")), "")]
    except ValueError:
        return False
    return found == [{"tokens": list(words), "tags": list(tags)} for words, tags in pairs]
