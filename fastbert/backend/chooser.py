"""The only chooser of backends: which implementation of an op runs, and why the others do not.

A backend is a package with one module per op, each with `unsupported`, `forward` and `backward`. `unsupported` sees
metadata only and answers with a sentence, or with None when the backend can run the call. fastbert/backend/names.py
lists the packages. A package may define more, which `offered` reads:

    unavailable               why none of its kernels can run in this process, a sentence
    misset                    why a setting of the environment cannot be met, a sentence that every call raises
    device_type               the type of device of its tensors in this process, where that is not the table's
    starts_on_current_device  True where its kernels start on torch's current device, not on their tensors' device
    captured                  True where a CUDA graph can hold its kernels
    loss_width                a function of V: elements in a row of the gradient that mlm_loss saves, where not V
    configurations            the module of the launch configurations that fastbert.tune() may replace
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from fastbert.backend import tuned
from fastbert.backend.names import BACKENDS, FORCED, SLUGS, TABLE, WHY_NOT_FORCED
from fastbert.files import quoted

# by device type, the backends that a call tries, in turn
ORDER = {
    kind: tuple(name for name, b in TABLE.items() if b.tried and b.device in (None, kind))
    for kind in dict.fromkeys(b.device for b in TABLE.values() if b.device)
}
# those that a call on any other device tries
_EVERYWHERE = tuple(name for name, b in TABLE.items() if b.tried and b.device is None)


def _package(name: str) -> ModuleType | str:
    """A backend's package, or the sentence that says why it cannot be imported."""
    package = TABLE[name].package
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return f"this version of fastbert has no {name} backend yet"
        return _lacking(name, error)


def _load(name: str, slug: str) -> ModuleType | str:
    """The implementation module, or the sentence that says why there is none."""
    package = _PACKAGES[name]
    if isinstance(package, str):
        return package
    if reason := getattr(package, "unavailable", None):
        return reason
    try:
        return importlib.import_module(f"{package.__name__}.{slug}")
    except ModuleNotFoundError as error:
        if error.name == f"{package.__name__}.{slug}":
            return f"the {name} backend has no {slug} kernel yet"
        return _lacking(name, error)


def _lacking(name: str, error: ModuleNotFoundError) -> str:
    return f"the {name} backend needs the package {error.name}: pip install {error.name}"


_PACKAGES = {name: _package(name) for name in BACKENDS}
_IMPLEMENTATIONS = {name: {slug: _load(name, slug) for slug in SLUGS} for name in BACKENDS}


def offered(name: str, attribute: str) -> Any:
    """What a backend's package defines under this name (the list is above), None where it does not."""
    return getattr(_PACKAGES.get(name), attribute, None)


# the device type that a backend is bound to; Triton's interpreter takes tensors on the CPU
_DEVICES = {
    name: kind
    for name in BACKENDS
    if (kind := offered(name, "device_type") or TABLE[name].device) is not None
}
# the backends whose kernels start on torch's current device, whatever the device of their tensors
ON_CURRENT_DEVICE = frozenset(n for n in BACKENDS if offered(n, "starts_on_current_device"))
_forced = FORCED
_debug = False
# by device, the winners that fastbert.tune() stored
tuned_tables: dict[torch.device, Any] = tuned.stored()


class Unsupported(RuntimeError):
    """A backend that is forced by name can't run a call; the message is its reason."""


class Explained(Exception):
    """Ends a call made under `explaining` once its table is recorded: (backends in order, the tuned one)."""


class _Explaining(threading.local):
    """The table that `explain` fills in this thread; other threads go on computing. Dynamo traces no ContextVar."""

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
        raise Unsupported(f"backend {quoted(name)} cannot run {slug}: {found}")
    return found


def _reason(name: str, slug: str, device: torch.device, args: tuple[Any, ...]) -> str | None:
    found = _IMPLEMENTATIONS[name][slug]
    if isinstance(found, str):
        return found
    return why_not_on(name, device.type) or found.unsupported(*args)


def why_not_on(name: str, kind: str) -> str | None:
    """Why a backend takes no tensors on a device of this type, or None."""
    if _DEVICES.get(name, kind) == kind:
        return None
    lacking = "" if device_of(name) else ", of which torch finds none on this machine"
    return f"the tensors are on {kind} and this backend runs on {_DEVICES[name]}{lacking}"


def order(kind: str) -> tuple[str, ...]:
    """The backends that a call on a device of this type tries, in turn."""
    return ORDER.get(kind, _EVERYWHERE)


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


# read by every call of an op
_CANDIDATES = {kind: {slug: _candidates(slug, kind) for slug in SLUGS} for kind in (*ORDER, "meta")}


def _tuned(slug: str, device: torch.device, args: tuple[Any, ...]) -> str | None:
    """The backend that fastbert.tune() found fastest for this class of call, None where it has not measured it."""
    table = tuned_tables.get(device)
    if not table or (key := tuned.key(slug, args)) is None:
        return None
    return table.get(key)


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
                f"backend {quoted(_forced)}, asked for by name, cannot run {slug}: {reason}"
            )
        return _forced
    kind = device.type
    known = _CANDIDATES.get(kind)
    candidates = known[slug] if known else _candidates(slug, kind)
    if tuned_tables and (best := _tuned(slug, device, args)) is not None:
        # the sort is stable: where the tuned backend can't run the call, the order holds
        candidates = tuple(sorted(candidates, key=lambda c: c[0] != best))
    for name, unsupported in candidates:
        if name == "torch" or unsupported(*args) is None:
            return name
    raise RuntimeError(f"no backend can run {slug} on {kind}")


def _validated(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"there is no backend {quoted(name)}: choose one of {', '.join(BACKENDS)}, or None"
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


def permits(package: ModuleType) -> bool:
    """Whether calls may run on the backend of this package: no other one is forced by name."""
    return _forced is None or _PACKAGES.get(_forced) is package


def captures() -> bool:
    """Whether a CUDA graph can hold the ops' kernels on a GPU: the ones of a backend that is forced by name may not."""
    return _forced is None or bool(offered(_forced, "captured"))


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


# why a setting of the environment cannot be met. The import goes on, so that the command line can print the sentence
misset: str | None = WHY_NOT_FORCED or next(
    filter(None, (offered(name, "misset") for name in BACKENDS)), None
)
