"""What `fastbert.tune()` found: the fastest backend of every op, by shape, dtype and device.

The file is tuned.json in $FASTBERT_CACHE, by default ~/.cache/fastbert. It is read at import; without
an entry for a call the static order of fastbert/backend.py holds.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from fastbert.files import cache_folder, write_text

# calls of at most this many rows are tuned apart from longer ones
FEW_ROWS = 256
# in an op's arguments, forward and backward: the tensor whose dtype, whose sizes and whose rows make its class
_PLACES = {
    "embed": ((4, 4, 0), (5, 5, 0)),
    "linear": ((0, 1, 0), (0, 2, 0)),
    "qkv_proj": ((0, 1, 0), (0, 2, 0)),
    "attention": ((0, 0, 0), (1, 1, 0)),
    "layer_norm": ((0, 0, 0), (1, 1, 0)),
    "dropout_add_layer_norm": ((0, 2, 0), (0, 2, 0)),
    "bias_gelu": ((0, 0, 0), (1, 1, 0)),
    "feed_forward": ((0, 1, 0), (0, 3, 0)),
    "cross_entropy": ((0, 0, 0), (1, 1, 0)),
    "mlm_loss": ((0, 1, 3), (1, 2, 4)),
}
# those whose sizes are a row's
_ROWS = ("attention", "layer_norm", "bias_gelu", "cross_entropy")

Key = tuple[str, torch.dtype, bool, tuple[int, ...]]
Table = dict[Key, str]
# a function of launch configurations with its arguments (kernels/_configured.py)
Call = tuple[str, tuple[Any, ...]]

_logger = logging.getLogger("fastbert")


def path() -> Path:
    """Where winners are stored."""
    return cache_folder() / "tuned.json"


def key(slug: str, args: tuple[Any, ...], backward: bool = False) -> Key:
    """The class of a call, from its forward's or backward's arguments: op, dtype, few rows or many, static sizes."""
    of, shaped, counted = _PLACES[slug][backward]
    sized = args[shaped]
    sizes = tuple((sized[0] if isinstance(sized, (list, tuple)) else sized).shape)
    sizes = sizes[1:] if slug in _ROWS else sizes
    return slug, args[of].dtype, args[counted].shape[0] <= FEW_ROWS, sizes


def device_name(device: torch.device) -> str:
    """What entries of a device are filed under."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from fastbert.testing.machine import cpu_name

    return cpu_name()


def _read() -> dict[str, Any]:
    """{device: {"entries": [...], ...}}; a file that can't be read counts as none and is named once."""
    try:
        return json.loads(path().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _logger.warning("%s is ignored: %s; run fastbert.tune() again", path(), error)
        return {}


def _class(entry: dict[str, Any]) -> Key:
    return entry["op"], getattr(torch, entry["dtype"]), entry["few_rows"], tuple(entry["sizes"])


def _table(entries: list[dict[str, Any]]) -> Table:
    return {_class(e): e["backend"] for e in entries}


def _of_devices(section: str) -> dict[torch.device, list[dict[str, Any]]]:
    """What the file has in a section for each device of this process. Looks at GPUs only if there is a file."""
    known = _read()
    devices = [torch.device("cpu")] if known else []
    if known and torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {device: known.get(device_name(device), {}).get(section, []) for device in devices}


def stored() -> dict[torch.device, Table]:
    """The winners of every device of this process that the file has some of."""
    return {
        device: _table(entries) for device, entries in _of_devices("entries").items() if entries
    }


def configurations() -> dict[Call, dict[str, Any]]:
    """The fields of every launch configuration that was found faster than the built-in one."""
    return {_call(e): e["fields"] for each in _of_devices("configurations").values() for e in each}


def _call(entry: dict[str, Any]) -> Call:
    """A stored call; a dtype was written by its name."""
    names = entry["arguments"]
    return entry["function"], tuple(
        getattr(torch, a[6:]) if isinstance(a, str) and a.startswith("torch.") else a for a in names
    )


def store(
    device: torch.device,
    results: dict[Key, dict[str, float]],
    facts: dict[str, Any],
    faster: dict[Call, dict[str, Any]] | None = None,
) -> Table:
    """Write the winners among {class: {backend: seconds}} beside older entries, and use them from now on.

    `faster` has the fields in which launch configurations that won differ from the built-in ones; where there are none,
    what was stored for the call is forgotten.
    """
    known = _read()
    before = known.get(device_name(device), {})
    entries = {_class(e): e for e in before.get("entries", [])}
    launches = {_call(e): e["fields"] for e in before.get("configurations", [])} | (faster or {})
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
        "configurations": [
            {"function": name, "arguments": [_written(a) for a in arguments], "fields": fields}
            for (name, arguments), fields in launches.items()
            if fields
        ],
    }
    path().parent.mkdir(parents=True, exist_ok=True)
    write_text(path(), json.dumps(known, indent=1) + "\n")
    return _table(list(entries.values()))


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
