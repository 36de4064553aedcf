"""Times every backend of every op on the user's own device, model and batch, and remembers the fastest."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import backend, tuned
from fastbert.testing.machine import machine_info

Seconds = dict[tuned.Key, dict[str, float]]


class _Timer(TorchDispatchMode):
    """Seconds that each class of call took, forward and backward together, and the backend that ran it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds: dict[tuple[tuned.Key, str], float] = defaultdict(float)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace != "fastbert":
            return func(*args, **(kwargs or {}))
        slug, _, direction = func._schema.name.removeprefix("fastbert::").rpartition("_")
        key = tuned.key(slug, args, backward=direction == "bwd")
        self._wait()
        started = time.perf_counter()
        result = func(*args)
        self._wait()
        self.seconds[key, args[-1]] += time.perf_counter() - started
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class _Always:
    """A table of winners with one backend for every call."""

    name: str

    def get(self, key: tuned.Key) -> str:
        return self.name


@contextlib.contextmanager
def _preferring(device: torch.device, name: str) -> Iterator[None]:
    """Inside, every op runs on this backend where it can."""
    before = backend.tuned_tables.get(device)
    backend.tuned_tables[device] = _Always(name)
    try:
        yield
    finally:
        if before is None:
            del backend.tuned_tables[device]
        else:
            backend.tuned_tables[device] = before


def tune(
    step: Callable[[], object], *, device: str | torch.device | None = None, rounds: int = 5
) -> dict[str, dict[str, dict[str, float]]]:
    """Time the backends that can run the ops of `step()` and use the fastest of each from now on.

    `step` is what should become fast, for instance `lambda: model(**batch).loss.backward()`; it is called rounds + 1
    times for every backend of the device, the first uncounted, in turn. The winner of each op, dtype and size, by the
    median of forward and backward together, is stored in tuned.json ($FASTBERT_CACHE or ~/.cache/fastbert) for this
    device and holds in later processes; a compiled model must be compiled again. Returns {op: {class: {backend:
    microseconds}}}. Raises ValueError where `step` calls no op of fastbert or a backend is forced by name.
    """
    if backend.forced() is not None:
        raise ValueError(
            f"backend {backend.forced()!r} is forced by name: fastbert.use(None) first"
        )
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    taken: dict[tuned.Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    names = backend.ORDER.get(where.type, ("torch",))
    for number in range(-1, rounds):
        for name in names:
            with _preferring(where, name), _Timer(where) as timer:
                step()
            for (key, ran), seconds in timer.seconds.items():
                # one that could not run the call has fallen back to another, which has a turn of its own
                if number >= 0 and ran == name:
                    taken[key][name].append(seconds)
    if not taken:
        raise ValueError(
            "step() called none of fastbert's ops: does the model use fastbert's modules?"
        )
    medians = {
        key: {name: sorted(values)[len(values) // 2] for name, values in by_name.items()}
        for key, by_name in taken.items()
    }
    backend.tuned_tables[where] = tuned.store(where, medians, {"machine": machine_info()})
    return _readable(medians)


def _readable(medians: Seconds) -> dict[str, dict[str, dict[str, float]]]:
    table: dict[str, dict[str, dict[str, float]]] = {}
    for (slug, dtype, few, sizes), seconds in medians.items():
        rows = f"up to {tuned.FEW_ROWS} rows" if few else "more rows"
        name = f"{'x'.join(map(str, sizes))} {str(dtype).removeprefix('torch.')}, {rows}"
        table.setdefault(slug, {})[name] = {k: round(1e6 * s, 1) for k, s in seconds.items()}
    return table
