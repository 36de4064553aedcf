"""Times every backend of every op on the user's own device, model and batch, and remembers the fastest."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastbert.backend import chooser, torch_private, tuned
from fastbert.files import quoted
from fastbert.machine import machine_info

_log = logging.getLogger("fastbert")

Seconds = dict[tuned.Key, dict[str, float]]
# a smaller gain than this may be chance
_GAIN = 0.02
# units in the last place of the largest element by which two orders of summation may differ
_ULPS = 16
# cycles for which a GPU waits, so that an op's launches are enqueued when they are timed: about a millisecond
_SLEEP = 2_000_000


@dataclass(frozen=True)
class _Timed:
    """A call of an op in one direction: its class, the backend that ran it, and how long it took."""

    key: tuned.Key
    backend: str
    seconds: float
    # the calls of configuration functions that it made
    configured: frozenset[tuned.Call]


class _Wrong(RuntimeError):
    """A launch configuration computes something else than the built-in one."""


class _Timer(TorchDispatchMode):
    """Times every call of an op. On a GPU that is the device's time, which is also the time in a captured graph."""

    def __init__(
        self,
        device: torch.device,
        asked: set[tuned.Call] | None = None,
        checked: tuned.Call | None = None,
        configurations: Any = None,
    ) -> None:
        super().__init__()
        self.device = device
        self.asked: set[tuned.Call] = set() if asked is None else asked
        # a call of a function of `configurations`: an op that makes it must have the result that the built-in
        # configuration gives
        self.checked, self.configurations = checked, configurations
        self.calls: list[_Timed] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        slug, _, direction = (
            torch_private.qualified_name(func).removeprefix("fastbert::").rpartition("_")
        )
        # an op without backends has another ending, and an op that is not tuned has no key
        key = None
        if func.namespace == "fastbert" and direction in ("fwd", "bwd"):
            key = tuned.key(slug, args, backward=direction == "bwd")
        if key is None:
            return func(*args, **(kwargs or {}))
        self.asked.clear()
        copies = () if self.checked is None else tree_map_only(torch.Tensor, torch.clone, args)
        result, seconds = self._timed(lambda: func(*args))
        self.calls.append(_Timed(key, args[-1], seconds, frozenset(self.asked)))
        if self.checked in self.asked:
            self._compare(result, func, copies)
        return result

    def _compare(self, result: Any, func: Any, args: Any) -> None:
        """Raise _Wrong where the built-in configuration has another result for the same arguments."""
        assert self.checked is not None
        own = self.configurations.own(self.checked)
        with self.configurations.trying(self.checked, own):
            expected = func(*args)
        for ours, theirs in zip(tree_leaves(result), tree_leaves(expected), strict=True):
            if not isinstance(ours, torch.Tensor) or not ours.numel():
                continue
            error = (ours.double() - theirs.double()).abs().max()
            bound = _ULPS * torch.finfo(ours.dtype).eps * theirs.double().abs().max()
            if not error <= bound:
                raise _Wrong(f"{func} is off by {error:.3g} where {bound:.3g} is allowed")

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        if self.device.type != "cuda":
            started = time.perf_counter()
            return call(), time.perf_counter() - started
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch_private.sleep(_SLEEP)
            start.record()
            result = call()
            end.record()
            end.synchronize()
        return result, start.elapsed_time(end) / 1e3

    def by_class(self) -> dict[tuple[tuned.Key, str], float]:
        """Seconds of each class of call and the backend that ran it, both directions together."""
        total: dict[tuple[tuned.Key, str], float] = defaultdict(float)
        for call in self.calls:
            total[call.key, call.backend] += call.seconds
        return total

    def asked_by_all(self) -> set[tuned.Call]:
        """Every call of a configuration function that some op made."""
        return set().union(*(c.configured for c in self.calls))

    def of(self, call: tuned.Call) -> float:
        """Seconds of the ops that made this call of a configuration function."""
        return sum(c.seconds for c in self.calls if call in c.configured)


@dataclass(frozen=True)
class _Always:
    """A table of winners with one backend for every call."""

    name: str

    def get(self, key: tuned.Key) -> str:
        return self.name


@contextlib.contextmanager
def _preferring(device: torch.device, name: str) -> Iterator[None]:
    """Inside, every op runs on this backend where it can."""
    before = chooser.tuned_tables.get(device)
    chooser.tuned_tables[device] = _Always(name)
    try:
        yield
    finally:
        if before is None:
            del chooser.tuned_tables[device]
        else:
            chooser.tuned_tables[device] = before


def tune(
    step: Callable[[], object],
    *,
    device: str | torch.device | None = None,
    rounds: int = 5,
    configurations: bool = True,
) -> dict[str, dict[str, dict[str, float]]]:
    """Time the backends that can run the ops of `step()` on a device and use the fastest from now on.

    `step` is the work that should become fast, for instance `lambda: model(**batch).loss.backward()`. First, with
    `configurations` and where Triton's kernels run, each of their launch configurations that the step uses is
    compared with its neighbours (a tile or the warps halved or doubled, a stage more or less), and with those of the
    winner, until none is 2 % faster: minutes, for every candidate is compiled. Then every backend of the device has a
    turn, rounds + 1 steps, the first uncounted. The winner of each op, dtype and size, by the median of forward and
    backward together, and each faster configuration are stored in tuned.json ($FASTBERT_CACHE or ~/.cache/fastbert)
    for this device and hold in later processes; a compiled model must be compiled and a graph captured again. On a GPU
    times are the device's. Returns {op: {class: {backend: microseconds}}}, and under "triton's configurations" the
    candidates. Raises ValueError where `step` calls no op of fastbert or a backend is forced by name.
    """
    if chooser.forced() is not None:
        raise ValueError(
            f"backend {quoted(chooser.forced())} is forced by name: fastbert.use(None) first"
        )
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    names, facts = chooser.order(where.type), {"machine": machine_info()}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in names if configurations else ():
        theirs = chooser.offered(name, "configurations")
        if theirs is not None and chooser.device_of(name) == where.type:
            search = _Search(name, theirs, step, where, rounds, facts)
            search.run()
            found[f"{name}'s configurations"] = search.shown
    taken: dict[tuned.Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(-1, rounds):
        for name in names:
            with _preferring(where, name), _Timer(where) as timer:
                step()
            for (key, ran), seconds in timer.by_class().items():
                # a backend that can't run the call has fallen back to another one, which has its own turn
                if number >= 0 and ran == name:
                    taken[key][name].append(seconds)
    if not taken:
        raise ValueError(
            "step() called none of fastbert's ops that are tuned: does the model use fastbert's modules?"
        )
    medians = {
        key: {name: statistics.median(values) for name, values in by_name.items()}
        for key, by_name in taken.items()
    }
    chooser.tuned_tables[where] = tuned.store(where, medians, facts)
    return _readable(medians) | {title: shown for title, shown in found.items() if shown}


class _Search:
    """Climbs from neighbour to faster neighbour, for every launch configuration of a backend that a step uses."""

    def __init__(
        self,
        backend: str,
        configurations: Any,
        step: Callable[[], object],
        device: torch.device,
        rounds: int,
        facts: dict[str, Any],
    ) -> None:
        self.backend, self.configurations = backend, configurations
        self.step, self.device, self.rounds, self.facts = step, device, rounds, facts
        self.shown: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        """Search them all, one after the other, and put the winners in force."""
        theirs = self.configurations
        for call in sorted(self._timer().asked_by_all(), key=str):
            if (config := theirs.in_force(call)) is None:
                continue
            best = config
            seen: dict[Any, float] = {}
            while True:
                candidates = [c for c in theirs.neighbours(call, best) if c not in seen]
                seen |= self._measured(call, [best, *candidates])
                fastest = min(seen, key=lambda c: seen[c])
                if seen[fastest] > (1 - _GAIN) * seen[best]:
                    break
                best = fastest
            self.shown[theirs.readable(call)] = {
                theirs.shown(c): round(1e6 * s, 1) for c, s in seen.items()
            }
            own = theirs.own(call)
            fields = {k: v for k, v in vars(best).items() if v != getattr(own, k)}
            # stored one by one: an interrupt loses only the one under way
            tuned.store(self.device, {}, self.facts, {call: fields})
            theirs.adopt(call, best)

    def _measured(self, call: tuned.Call, configs: list[Any]) -> dict[Any, float]:
        """{configuration: seconds}, medians of interleaved rounds; one that does not compile or fit is left out."""
        theirs = self.configurations
        taken: dict[Any, list[float]] = {}
        for number, config in enumerate(configs):
            with theirs.trying(call, config):
                try:
                    self._timer(call)
                except theirs.FAILURES as error:
                    # too much shared memory, or a tile that does not compile; the first configuration has run before
                    if number == 0 or isinstance(error, torch.OutOfMemoryError):
                        raise
                    _log.info("%s, %s: %s", theirs.readable(call), config, error)
                    continue
            taken[config] = []
        for _ in range(self.rounds):
            for config, seconds in taken.items():
                with theirs.trying(call, config):
                    seconds.append(self._timer().of(call))
        return {config: statistics.median(seconds) for config, seconds in taken.items()}

    def _timer(self, checked: tuned.Call | None = None) -> _Timer:
        with (
            _preferring(self.device, self.backend),
            self.configurations.asking() as asked,
            _Timer(self.device, asked, checked, self.configurations) as timer,
        ):
            self.step()
        return timer


def _readable(medians: Seconds) -> dict[str, dict[str, dict[str, float]]]:
    table: dict[str, dict[str, dict[str, float]]] = {}
    for (slug, dtype, few, sizes), seconds in medians.items():
        rows = f"up to {tuned.FEW_ROWS} rows" if few else "more rows"
        name = f"{'x'.join(map(str, sizes))} {str(dtype).removeprefix('torch.')}, {rows}"
        table.setdefault(slug, {})[name] = {k: round(1e6 * s, 1) for k, s in seconds.items()}
    return table
