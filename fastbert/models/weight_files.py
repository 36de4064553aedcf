"""The tensors of model.safetensors and pytorch_model.bin files, whole or in shards."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastbert.files import listed, parse_json, read_text

State = dict[str, Tensor]

# exceptions of torch.load for truncated files and for files of another kind
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, KeyError, IndexError, AttributeError),
)


def read_weights(folder: Path) -> State:
    """All tensors of a directory's model.safetensors or pytorch_model.bin, whole or in shards with an index.

    Raises FileNotFoundError if there is none, ValueError for a damaged file or one that holds code.
    """
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return {k: v for shard in _shards(index) for k, v in read(shard).items()}
    found = listed(sorted(path.name for path in folder.iterdir()))
    raise FileNotFoundError(
        f"{folder} has no model.safetensors or pytorch_model.bin, whole or in shards, but {found}"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        files = set(parse_json(read_text(index))["weight_map"].values())
        shards = sorted(index.parent / Path(str(name)).name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of shards, a JSON object with a weight_map: copy it again"
        ) from error
    # unlike Path.is_file, it returns False for a name that no file can have
    absent = [shard.name for shard in shards if not os.path.isfile(shard)]
    if absent:
        raise FileNotFoundError(f"{index.parent} lacks {listed(absent)}, which {index.name} names")
    return shards


def _read_safetensors(file: Path) -> State:
    _check_pointer(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged, not a whole safetensors file ({error}): copy it again"
        ) from error


def _read_bin(file: Path) -> State:
    state = read_pickle(file)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{file} holds more than tensors by name: save a model's state_dict() alone"
        )
    return state


def read_pickle(file: Path, allowed: tuple[type, ...] = ()) -> Any:
    """torch.load of tensors and plain containers; Python objects are refused, except of the `allowed` classes."""
    _check_pointer(file)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        found = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", str(error), re.IGNORECASE)
        if found is not None:
            raise ValueError(
                f"{file} holds Python objects ({found[1]}), which could run code: save its tensors alone, "
                "as model.safetensors"
            ) from error
        raise ValueError(
            f"{file} is damaged, not a whole file of torch.save ({type(error).__name__}): copy it again"
        ) from error


def _check_pointer(file: Path) -> None:
    with open(file, "rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`")
