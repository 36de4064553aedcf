"""What `fastbert.tune()` found: the fastest backend of every op, by shape, dtype and device.

The file is tuned.json in $FASTBERT_CACHE, by default ~/.cache/fastbert. It is read at import; without
an entry for a call the static order of fastbert/backend/chooser.py holds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastbert.backend.names import BACKENDS
from fastbert.files import cache_folder, parse_json, quoted, read_text, write_text
from fastbert.machine import cpu_name

# calls of at most this many rows are tuned apart from longer ones
FEW_ROWS = 256
Key = tuple[str, torch.dtype, bool, tuple[int, ...]]
Table = dict[Key, str]
# a function of launch configurations with its arguments (kernels/_configured.py)
Call = tuple[str, tuple[Any, ...]]

_LAUNCHES = "configurations"


class TunedBy(NamedTuple):
    """The arguments of an op's forward or backward, by name, that make the class of a call.

    Calls of one class have one fastest backend. An argument that holds a list of tensors counts by the first one.
    """

    # the tensor whose dtype counts
    dtype: str
    # the tensor whose sizes count
    sizes: str
    # the tensor whose first size is the number of rows
    rows: str
    # whether the sizes are those of one row of that tensor: the first one is left out
    of_row: bool = False


# {(op, whether its backward): positions of the three arguments, and whether the sizes are those of a row}
_keys: dict[tuple[str, bool], tuple[int, int, int, bool]] = {}

_logger = logging.getLogger("fastbert")


def path() -> Path:
    """Where winners are stored."""
    return cache_folder() / "tuned.json"


def register(slug: str, backward: bool, names: list[str], by: TunedBy) -> None:
    """Have `key` find the class of a call by these arguments; `names` has all of them, in order."""
    if unknown := [name for name in by[:3] if name not in names]:
        raise ValueError(
            f"{slug} is tuned by {', '.join(unknown)}, which it does not take: choose among {', '.join(names)}"
        )
    dtype, sizes, rows = map(names.index, by[:3])
    _keys[slug, backward] = dtype, sizes, rows, by.of_row


def key(slug: str, args: tuple[Any, ...], backward: bool = False) -> Key | None:
    """The class of a call, from its forward's or backward's arguments: op, dtype, few rows or many, static sizes.

    None for an op that is not tuned.
    """
    places = _keys.get((slug, backward))
    if places is None:
        return None
    dtype, sized, rows, of_row = places
    of = args[sized]
    sizes = tuple((of[0] if isinstance(of, (list, tuple)) else of).shape)
    sizes = sizes[1:] if of_row else sizes
    return slug, args[dtype].dtype, args[rows].shape[0] <= FEW_ROWS, sizes


def device_name(device: torch.device) -> str:
    """The name under which the file holds a device's entries."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def _read() -> dict[str, Any]:
    """{device: {"entries": [...], ...}}; a file that can't be read counts as none and is named once."""
    try:
        known = parse_json(read_text(path()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _logger.warning("%s is ignored: %s; run fastbert.tune() again", path(), error)
        return {}
    if isinstance(known, dict) and all(isinstance(each, dict) for each in known.values()):
        return known
    _logger.warning("%s is ignored: it holds no devices; run fastbert.tune() again", path())
    return {}


def _parsed(section: dict[str, Any], name: str, parse: Callable[[Any], Any]) -> dict[Any, Any]:
    """A device's entries, parsed. One of another version, or a wrong one, is logged and left out."""
    entries, found = section.get(name, []), {}
    for entry in entries if isinstance(entries, list) else []:
        try:
            key, value = parse(entry)
            found[key] = value
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _logger.warning(
                "%s: %r is ignored (%r): run fastbert.tune() again", path(), entry, error
            )
    return found


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found


def _winner(entry: dict[str, Any]) -> tuple[Key, dict[str, Any]]:
    """An entry with its class."""
    if entry["backend"] not in BACKENDS:
        raise ValueError(f"{quoted(entry['backend'])} is no backend")
    dtype, sizes = _dtype(entry["dtype"]), tuple(entry["sizes"])
    return (entry["op"], dtype, bool(entry["few_rows"]), sizes), entry


def _launch(entry: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    """A stored call and the fields of its configuration; a dtype was written by its name."""
    arguments = tuple(
        _dtype(a[6:]) if isinstance(a, str) and a.startswith("torch.") else a
        for a in entry["arguments"]
    )
    return (entry["function"], arguments), dict(entry["fields"])


def _table(entries: dict[Key, dict[str, Any]]) -> Table:
    return {key: entry["backend"] for key, entry in entries.items()}


def _of_devices() -> dict[torch.device, dict[str, Any]]:
    """The file's section for each device of this process. GPUs are looked up only if there is a file."""
    known = _read()
    devices = [torch.device("cpu")] if known else []
    if known and torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {device: known.get(device_name(device), {}) for device in devices}


def stored() -> dict[torch.device, Table]:
    """The winners for each device of this process for which the file has some."""
    tables = {d: _table(_parsed(s, "entries", _winner)) for d, s in _of_devices().items()}
    return {device: table for device, table in tables.items() if table}


def configurations() -> dict[Call, dict[str, Any]]:
    """The fields of every launch configuration that was found faster than the built-in one.

    GPUs of one architecture share them in a process.
    """
    found: dict[Call, dict[str, Any]] = {}
    for section in _of_devices().values():
        found |= _parsed(section, _LAUNCHES, _launch)
    return found


def store(
    device: torch.device,
    results: dict[Key, dict[str, float]],
    facts: dict[str, Any],
    faster: dict[Call, dict[str, Any]] | None = None,
) -> Table:
    """Write the winners among {class: {backend: seconds}} beside older entries, and use them from now on.

    `faster` has the launch configurations that won: the fields that differ from the built-in one. One without such
    fields removes what was stored for the call.
    """
    known = _read()
    before = known.get(device_name(device), {})
    entries = _parsed(before, "entries", _winner)
    launches = _parsed(before, _LAUNCHES, _launch) | (faster or {})
    for (slug, dtype, few, sizes), seconds in results.items():
        winner = min(seconds, key=lambda name: seconds[name])
        entry = {
            "op": slug,
            "dtype": str(dtype).removeprefix("torch."),
            "few_rows": few,
            "sizes": list(sizes),
            "backend": winner,
            "microseconds": {name: round(1e6 * s, 2) for name, s in seconds.items()},
        }
        entries[(slug, dtype, few, sizes)] = entry
    known[device_name(device)] = {
        **facts,
        "entries": list(entries.values()),
        _LAUNCHES: [
            {"function": name, "arguments": [_written(a) for a in arguments], "fields": fields}
            for (name, arguments), fields in launches.items()
            if fields
        ],
    }
    path().parent.mkdir(parents=True, exist_ok=True)
    write_text(path(), json.dumps(known, indent=1) + "\n")
    return _table(entries)


def _written(argument: Any) -> Any:
    return str(argument) if isinstance(argument, torch.dtype) else argument


def winners(tables: dict[torch.device, Any], kind: str) -> dict[str, str]:
    """{class of a call in words: backend or launch configuration} of a type of device, for a run's manifest."""
    launches = configurations() if kind == "cuda" else {}
    return {
        " ".join((name, *map(str, arguments))): str(fields)
        for (name, arguments), fields in launches.items()
    } | {
        f"{slug} {'x'.join(map(str, sizes))} {dtype} {'few' if few else 'many'} rows": name
        for device, table in tables.items()
        if device.type == kind
        for (slug, dtype, few, sizes), name in sorted(table.items(), key=str)
    }
