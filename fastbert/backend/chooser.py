"""The only chooser of backends: which implementation of an op runs, and why the others do not.

A backend is a package with one module per op, each with `unsupported`, `forward` and `backward`. `unsupported` sees
metadata only and answers with a sentence, or with None when the backend can run the call.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from fastbert.backend import cpu, tuned
from fastbert.backend.names import BACKENDS, SLUGS

# fastest first; `torch` is last and always answers, `reference` runs by name only
ORDER = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}

_PACKAGES = {
    "cpu": "fastbert.backend.cpu",
    "triton": "fastbert.kernels",
    "cuda": "fastbert.backend.cuda",
    "torch": "fastbert.backend.stock",
    "reference": "fastbert.backend.reference",
}


def _load(name: str, slug: str) -> ModuleType | str:
    """The implementation module, or the sentence that says why there is none."""
    package = _PACKAGES[name]
    try:
        parent = importlib.import_module(package)
        if reason := getattr(parent, "unavailable", None):
            return reason
        return importlib.import_module(f"{package}.{slug}")
    except ModuleNotFoundError as error:
        if error.name == package:
            return f"this version of fastbert has no {name} backend yet"
        if error.name == f"{package}.{slug}":
            return f"the {name} backend has no {slug} kernel yet"
        return f"the {name} backend needs the package {error.name}: pip install {error.name}"


_IMPLEMENTATIONS = {name: {slug: _load(name, slug) for slug in SLUGS} for name in BACKENDS}
# the device type that a backend is bound to; Triton's interpreter takes tensors on the CPU
_DEVICES = {
    "cpu": "cpu",
    "triton": getattr(sys.modules.get("fastbert.kernels"), "device_type", "cuda"),
    "cuda": "cuda",
}
_forced: str | None = None
_debug = False
# by device, what fastbert.tune() found
tuned_tables: dict[torch.device, Any] = tuned.stored()


class Unsupported(RuntimeError):
    """A backend that was asked for by name can't run a call; the message is its reason."""


class Explained(Exception):
    """Ends a call made under `explaining` once its table is recorded: (backends in order, the tuned one)."""


class _Explaining(threading.local):
    """The table that `explain` fills in this thread; other threads compute on. Dynamo traces no ContextVar."""

    table: dict[str, str | None] | None = None


_explaining = _Explaining()


@contextlib.contextmanager
def explaining() -> Iterator[dict[str, str | None]]:
    """Inside, in this thread, `choose` fills the yielded {backend: reason or None} and raises Explained."""
    table: dict[str, str | None] = {}
    _explaining.table = table
    try:
        yield table
    finally:
        _explaining.table = None


def module(name: str, slug: str) -> Any:
    """The implementation of one op by one backend; raises Unsupported with the reason if there is none."""
    found = _IMPLEMENTATIONS[name][slug]
    if isinstance(found, str):
        raise Unsupported(f"backend {name!r} cannot run {slug}: {found}")
    return found


def _reason(name: str, slug: str, device: torch.device, args: tuple[Any, ...]) -> str | None:
    found = _IMPLEMENTATIONS[name][slug]
    if isinstance(found, str):
        return found
    if _DEVICES.get(name, device.type) != device.type:
        lacking = "" if device_of(name) else ", of which torch finds none on this machine"
        return (
            f"the tensors are on {device.type} and this backend runs on {_DEVICES[name]}{lacking}"
        )
    return found.unsupported(*args)


def order(kind: str) -> tuple[str, ...]:
    """The backends of a device type that are tried, in turn."""
    return ORDER.get(kind, ("torch",))


def _explained_order(slug: str, device: torch.device, args: tuple[Any, ...]) -> tuple[str, ...]:
    if _forced is not None:
        return (_forced,)
    best, names = _tuned(slug, device, args), order(device.type)
    return names if best is None else (best, *names)


def _candidates(slug: str, kind: str) -> tuple[tuple[str, Any], ...]:
    """(name, its `unsupported`) of the backends that have the op's kernel for a device type, in ORDER."""
    return tuple(
        (name, found.unsupported)
        for name in order(kind)
        if not isinstance(found := _IMPLEMENTATIONS[name][slug], str)
        and _DEVICES.get(name, kind) == kind
    )


# every call of an op asks
_CANDIDATES = {kind: {slug: _candidates(slug, kind) for slug in SLUGS} for kind in (*ORDER, "meta")}


def _tuned(slug: str, device: torch.device, args: tuple[Any, ...]) -> str | None:
    """The backend that fastbert.tune() found fastest for this class of call, None where it has not measured it."""
    table = tuned_tables.get(device)
    return table.get(tuned.key(slug, args)) if table else None


def choose(slug: str, device: torch.device, *args: Any) -> str:
    """The backend's name for this call: the forced one, the tuned one, or the first of the ORDER that supports it."""
    if misset is not None:
        raise ValueError(misset)
    table = _explaining.table
    if table is not None:
        table.update((name, _reason(name, slug, device, args)) for name in BACKENDS)
        raise Explained(_explained_order(slug, device, args), _tuned(slug, device, args))
    if _forced is not None:
        reason = _reason(_forced, slug, device, args)
        if reason is not None:
            raise Unsupported(
                f"backend {_forced!r}, asked for by name, cannot run {slug}: {reason}"
            )
        return _forced
    kind = device.type
    known = _CANDIDATES.get(kind)
    candidates = known[slug] if known else _candidates(slug, kind)
    if tuned_tables and (best := _tuned(slug, device, args)) is not None:
        # the sort is stable: what can't run the call is passed over
        candidates = tuple(sorted(candidates, key=lambda c: c[0] != best))
    for name, unsupported in candidates:
        if name == "torch" or unsupported(*args) is None:
            return name
    raise RuntimeError(f"no backend can run {slug} on {kind}")


def _validated(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"there is no backend {name!r}: choose one of {', '.join(BACKENDS)}, or None"
        )
    return name


class use:
    """Force one backend by name for the whole process, or give the choice back with None.

    Works as a call, `fastbert.use("torch")`, and as a context manager, `with fastbert.use("torch"): ...`, which
    restores what was in force before. A forced backend never falls back: a call it can't run raises its reason.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._before = _forced
        _forced = _validated(name)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._before


def device_of(name: str) -> str | None:
    """The device type on which a backend's kernels run in this process, None if it has none."""
    kind = _DEVICES.get(name, "cpu")
    return None if kind == "cuda" and not torch.cuda.is_available() else kind


def forced() -> str | None:
    """The backend in force by name, or None."""
    return _forced


class debug:
    """Check values (ids, labels, cu_seqlens) on GPUs too, at the price of a sync; call or context manager."""

    def __init__(self, on: bool = True) -> None:
        global _debug
        self._before = _debug
        _debug = bool(on)

    def __enter__(self) -> debug:
        return self

    def __exit__(self, *exc: object) -> None:
        global _debug
        _debug = self._before


def checks_values(device: torch.device) -> bool:
    """Whether values, not only metadata, are checked on this device: always on the CPU, elsewhere under `debug`."""
    return device.type == "cpu" or _debug


def matrix() -> dict[str, dict[str, str | None]]:
    """{slug: {backend: None if the kernel is there, else why not}}, independent of any call."""
    return {
        slug: {
            name: found if isinstance(found := _IMPLEMENTATIONS[name][slug], str) else None
            for name in BACKENDS
        }
        for slug in SLUGS
    }


_forced = os.environ.get("FASTBERT_BACKEND") or None
# why what the environment asks for can't be had. Importing goes on, so that the command line can say it in a sentence;
# then nothing runs: a typo in a variable that forces something must not pass
misset = cpu.misset
if _forced not in (None, *BACKENDS):
    misset = f"FASTBERT_BACKEND is {_forced!r}: choose one of {', '.join(BACKENDS)}, or unset it"
