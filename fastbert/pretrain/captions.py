"""A folder of images with the file of their captions; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastbert.files import IMAGES, existing, images_in, listed
from fastbert.finetune.records import Record, read_records

FILES = ("captions.tsv", "captions.csv", "captions.jsonl")
# names of the columns of a file and of its caption; the second pair is that of Hugging Face's image folders
COLUMNS = (("file", "caption"), ("file_name", "text"))


@dataclass(frozen=True)
class Captioned:
    """An image, its captions, and the place of the first one, which messages name."""

    file: Path
    captions: list[str]
    place: str


def read_captions(folder: str | Path) -> list[Captioned]:
    """The images of a folder with their captions, in the order of the captions file; an image may have several lines.

    Raises FileNotFoundError or ValueError, naming the file and the line, for a file that is missing, empty or has other
    columns, for a caption without an image, and for an image without caption. No image is opened.
    """
    folder = existing(folder, IMAGES)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: {IMAGES}, with {' or '.join(FILES)} in it")
    there = [folder / name for name in FILES if (folder / name).is_file()]
    if len(there) != 1:
        names = listed(path.name for path in there) or "no file of captions"
        raise ValueError(f"{folder} has {names}: put one of {', '.join(FILES)} there")
    (path,) = there
    records = read_records(path)
    columns = _columns(records[0])
    found: dict[str, Captioned] = {}
    for record in records:
        name, caption = (record.string(column) for column in columns)
        if name not in found:
            if not (folder / name).is_file():
                raise ValueError(
                    f"{record.place}: there is no image {name} in {folder}: correct the name, or leave the line out"
                )
            found[name] = Captioned(folder / name, [], record.place)
        found[name].captions.append(caption)
    named = {one.file.resolve() for one in found.values()}
    for image in images_in([folder]):
        if image.resolve() not in named:
            raise ValueError(f"{image} has no line in {path}: add one, or move the image elsewhere")
    return [*found.values()]


def _columns(record: Record) -> tuple[str, str]:
    for names in COLUMNS:
        if set(names) <= set(record.values):
            return names
    wanted = " or ".join(f"{a} and {b}" for a, b in COLUMNS)
    raise ValueError(
        f"{record.place} has the fields {listed(record.values)}: name them {wanted} in the first line"
    )
