"""The store of pixels and captions that a run on images reads.

It is two files: NAME.bin has the bytes of all images one after the other, NAME.json their sizes, their captions and a
hash of it all. Images are decoded once; training maps the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data import ShardsError
from fastbert.data.images import U8, TooLarge, read_image
from fastbert.files import parse_json, read_text, replacing, write_text
from fastbert.pretrain.captions import read_captions


class Pictures:
    """An open store: the pixels of image i by `pixels(i)`, its captions by `captions[i]`."""

    def __init__(self, path: Path) -> None:
        settings, pixels = path.with_suffix(".json"), path.with_suffix(".bin")
        try:
            values = parse_json(read_text(settings))
            self.sizes = [(int(h), int(w)) for h, w in values["sizes"]]
            self.captions: list[list[str]] = [[*map(str, some)] for some in values["captions"]]
            # the images from this number on are for evaluation; None: a part of all is
            self.held_from: int | None = values["held_from"]
            self.digest = str(values["sha256"])
            self._bytes = np.memmap(pixels, np.uint8, "r")
            found = _sealed(
                hashlib.sha256(self._bytes.data), self.sizes, self.captions, self.held_from
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ShardsError(f"{settings} is damaged: start a new run") from error
        if found != self.digest:
            raise ShardsError(f"{settings} and {pixels} do not belong together: start a new run")
        self._starts = np.cumsum([0] + [3 * h * w for h, w in self.sizes])

    def __len__(self) -> int:
        return len(self.sizes)

    def pixels(self, number: int) -> U8:
        """(height, width, 3)."""
        part = self._bytes[self._starts[number] : self._starts[number + 1]]
        return np.asarray(part).reshape(*self.sizes[number], 3)


def store_pictures(
    path: Path, folder: str, held: str | None, patch_size: int, sides: int
) -> Pictures:
    """Decode the images of a folder, and of one for evaluation, into a new store at `path`.

    Raises FileNotFoundError or ValueError, naming file and line, as read_captions and read_image do.
    """
    parts = [read_captions(folder), read_captions(held) if held is not None else []]
    everything = [one for part in parts for one in part]
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes, digest = [], hashlib.sha256()
    with replacing(path.with_suffix(".bin")) as new, open(new, "wb") as file:
        for one in everything:
            try:
                pixels = read_image(one.file, patch_size, sides)
            except ValueError as error:
                remedy = "" if isinstance(error, TooLarge) else ": repair it, or leave it out"
                raise ValueError(f"{one.place}: {error}{remedy}") from error
            sizes.append(pixels.shape[:2])
            data = pixels.tobytes()
            file.write(data)
            digest.update(data)
    captions = [one.captions for one in everything]
    held_from = None if held is None else len(parts[0])
    values: dict[str, Any] = {
        "sizes": sizes,
        "captions": captions,
        "held_from": held_from,
        "sha256": _sealed(digest, sizes, captions, held_from),
    }
    write_text(path.with_suffix(".json"), json.dumps(values) + "\n")
    return Pictures(path)


def _sealed(digest: Any, sizes: Any, captions: Any, held_from: int | None) -> str:
    """The hash of a store: of its pixels, which `digest` has read, and of all else."""
    digest.update(json.dumps([sizes, captions, held_from]).encode())
    return str(digest.hexdigest())
