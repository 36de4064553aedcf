"""Paths that users name, and files that a kill or a full disk leaves whole, the old one or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# the first letters in names of files and folders that a killed process may leave
UNFINISHED = ".unfinished-"
# the remedies for a path that does not exist, by the kind of file that is read there
TEXTS = "name a text file, a folder, or - for stdin"
RECORDS = "name a file of labelled data"
LINES = "name a text file with one text per line, or - for standard input"
TOKENIZER_FILES = "name a tokenizer's folder or file"
# and for a file where a folder is written
SHARDS = "name a folder for the tokenised text"


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
    """The path of a folder, or of one to be made; raises ValueError, with the remedy, for a file."""
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file: {remedy}")
    return Path(path)


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
