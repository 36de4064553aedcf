"""Text: read line by line, shortened in messages, and written so that a kill leaves the old file or the new one, whole.

A line ends in LF, CRLF or CR. No other character ends one, and a byte order mark at the beginning is dropped.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# the first letters in names of files and folders that a killed process may leave
UNFINISHED = ".unfinished-"
# the remedies for a path that does not exist, by the kind of file that is read there
TEXTS = "name a text file, a folder, or - for stdin"
IMAGES = "name an image file, or a folder of images"
RECORDS = "name a file of labelled data"
LINES = "name a text file with one text per line, or - for standard input"
TOKENIZER_FILES = "name a tokenizer's folder or file"
# and for a file where a folder is written
SHARDS = "name a folder for the tokenised text"

# of the images in a folder
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")

_LINE_END = re.compile(r"\r\n?|\n")
# JSON escapes the others itself
_SEEMING_LINE_END = re.compile(r"[\x85\u2028\u2029]")


def cache_folder() -> Path:
    """$FASTBERT_CACHE, by default ~/.cache/fastbert."""
    return Path(os.environ.get("FASTBERT_CACHE") or "~/.cache/fastbert").expanduser()


def existing(path: str | Path, remedy: str) -> Path:
    """The path; raises FileNotFoundError, with the remedy, where nothing is there."""
    # unlike Path.exists, it returns False for a name that no file can have
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist: {remedy}")
    return Path(path)


def folder_or_new(path: str | Path, remedy: str) -> Path:
    """The path of a folder, or of one to be made; raises ValueError, with the remedy, for a file or inside of one."""
    for place in (Path(path), *Path(path).parents):
        if os.path.isfile(place):
            raise ValueError(f"{place} is a file: {remedy}")
    return Path(path)


def images_in(paths: Sequence[str | Path]) -> list[Path]:
    """The image files among the paths and in the folders that they name, these in the order of their names.

    Raises FileNotFoundError for a path that does not exist, ValueError for a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        here = existing(path, IMAGES)
        if here.is_dir():
            inside = sorted(p for p in here.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise ValueError(f"{path} holds no image that ends in {', '.join(IMAGE_SUFFIXES)}")
            found += inside
        else:
            found.append(here)
    return found


def decoded(data: bytes, name: str, offset: int = 0) -> str:
    """The text of some bytes of a source, from byte `offset` on; raises ValueError where they are no UTF-8."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 at byte {offset + error.start} ({error.reason}): convert or repair it"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{name} has a zero byte near byte {offset + data.index(0)}: it is not a text file"
        )
    return text.removeprefix("\ufeff") if offset == 0 else text


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their ends."""
    lines = _LINE_END.split(text) if "\r" in text else text.split("\n")
    return lines if lines[-1] else lines[:-1]


def lines_of(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a UTF-8 stream, without their ends; raises ValueError that names the place of what is no text."""
    offset = 0
    # a stream of bytes is cut after every LF, so never inside of CRLF
    for data in stream:
        yield from split_lines(decoded(data, name, offset))
        offset += len(data)


@contextmanager
def unpacked(stream: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """The content of a stream, unpacked where the name ends in .gz; raises ValueError for what is no such file."""
    try:
        yield gzip.GzipFile(fileobj=stream) if name.endswith(".gz") else stream  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{name} is a broken gzip file ({error}): make or download it again"
        ) from error


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where it is a .gz."""
    with open(path, "rb") as file, unpacked(file, str(path)) as stream:
        return stream.read()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file or .gz, with its line ends as they are."""
    return decoded(read_bytes(path), str(path))


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file or .gz."""
    return list(lines_of(io.BytesIO(read_bytes(path)), str(path)))


def parse_json(text: str) -> Any:
    """The value of a JSON text; raises ValueError for anything else, and for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, whose file becomes `path` when the block ends well, after it has reached the disk."""
    new = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        new.touch()
        mode = new.stat().st_mode
        yield new
        # safetensors makes files that no other user can read
        new.chmod(mode)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_files(folder: Path) -> None:
    """Put the content of every file below the folder on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put a rename inside the folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
    write_bytes(path, text.encode())


def json_lines(rows: Iterable[Any]) -> str:
    """A line of JSON for each row; characters that some programs take for line ends are escaped."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return _SEEMING_LINE_END.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = 100


def why_not_text(value: Any) -> str | None:
    """Why a value is no text that a tokenizer takes, as the end of a sentence; None for such a text."""
    if not isinstance(value, str) or not value.strip():
        return f"is {quoted(value)}: it must be a text"
    return why_not_unicode(value)


def why_not_unicode(text: str) -> str | None:
    """Why a string can't be written in UTF-8, as the end of a sentence; None where it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"is {quoted(text)}, with half a surrogate pair at character {error.start}: repair it"
        )
    return None


def quoted(value: object) -> str:
    """The value as Python writes it, for a message: of a long one the beginning and the end."""
    return shortened(_VALUES.repr(value), 200)


def shortened(text: str, most: int = 100) -> str:
    """The text, or the beginning and the end of one with more than `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def listed(names: Iterable[object], most: int = 8) -> str:
    """The names with commas between them, for a message: the first `most` of them, and the number of the others."""
    found = list(names)
    rest = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(shortened(str(name)) for name in found[:most]) + rest
