"""Files of a run, written so that a kill or a full disk at any moment leaves the old one or the new one, whole."""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.files import UNFINISHED, replacing, sync_files, sync_folder, write_text


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, all of it or nothing."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new folder that becomes `folder`, replacing an older one, when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        fill(new)
        sync_files(new)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)
    sync_folder(folder.parent)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process was writing."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


class Checkpoints:
    """The folder of a run's checkpoints, of which the last `keep` are kept; each is a file."""

    # of a checkpoint's name, step-00000012.pt
    suffix = ".pt"

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.folder / f"step-{step:08d}{self.suffix}"

    def paths(self) -> list[Path]:
        """All of them, oldest first."""
        name = re.compile(rf"step-(\d+){re.escape(self.suffix)}")
        found = [(int(m[1]), p) for p in self.folder.glob("*") if (m := name.fullmatch(p.name))]
        return [path for _, path in sorted(found)]

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write one, then delete the oldest; raises OSError, with all older ones kept, where it can't be written."""
        path = self.path(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            try:
                torch.save(state, new)
            except RuntimeError as error:
                # torch hides the system's error about a full disk
                raise OSError(f"{path} can't be written: {error}") from error
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest one, or None; raises ValueError, with its name, if it is damaged."""
        paths = self.paths()
        if not paths:
            return None
        try:
            state = self._read(paths[-1])
            if not isinstance(state, dict) or not state:
                raise TypeError("it holds no state of a run")
        except Exception as error:  # a damaged file raises nearly anything
            raise ValueError(
                f"{paths[-1]} is damaged ({str(error).splitlines()[0]}): delete it to resume from the one before it"
            ) from error
        return state

    def _read(self, path: Path) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True)


def capture_rng() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators, in types that torch.load(weights_only=True) accepts."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 -- the global one
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.array(keys, dtype=np.int64)), place, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators to the states that capture_rng returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, place, has_gauss, gauss = state["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state((kind, keys, place, has_gauss, gauss))  # noqa: NPY002 -- the global one
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
