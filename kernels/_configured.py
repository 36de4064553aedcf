"""Launch configurations that fastbert.tune() may replace, per device, by faster ones that it measured.

A function decorated with `configured` returns the launch configuration for its arguments, without side effects. If
tune() has found a faster one for these arguments on this device, the function returns the faster one.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.errors import TritonError

from fastbert.backend import tuned

# a function's name and its arguments
Call = tuple[str, tuple[Any, ...]]
# fields that `neighbours` halves and doubles, with their smallest and largest values
_SIZES = {
    "ROWS": (1, 16),
    "BLOCK_M": (16, 256),
    "BLOCK_N": (16, 256),
    "BLOCK_K": (16, 128),
    "BLOCK_V": (512, 16384),
    "num_warps": (1, 16),
}
_STAGES = ("STAGES", "num_stages")
# what a launch raises whose configuration does not compile, or does not fit the device
FAILURES = (TritonError, RuntimeError)

_log = logging.getLogger("fastbert")
_stored = tuned.configurations()
_functions: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {}
_winners: dict[Call, Any] = {}
# the calls that `asking` collects, None outside it
_asked: set[Call] | None = None


def configured(*fixed: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a pure function of positional arguments that returns a configuration; tune() keeps `fixed` fields."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name, default = function.__name__.strip("_"), functools.cache(function)
        _functions[name] = default, fixed
        for (of, arguments), fields in _stored.items():
            if of == name and (found := _restored(default, arguments, fields)) is not None:
                _winners[name, arguments] = found

        @functools.wraps(function)
        def choose(*arguments: Any) -> Any:
            if _asked is not None:
                _asked.add((name, arguments))
            if _winners and (found := _winners.get((name, arguments))) is not None:
                return found
            return default(*arguments)

        return choose

    return decorate


def _restored(function: Callable[..., Any], arguments: tuple[Any, ...], fields: Any) -> Any:
    """The stored configuration, or None if this version has no such call, field or value."""
    try:
        own = function(*arguments)
        if own is not None and all(_legal(name, value) for name, value in fields.items()):
            return dataclasses.replace(own, **fields)
    except (TypeError, ValueError):
        pass
    _log.warning(
        "%s: %s of %s is ignored: run fastbert.tune() again", tuned.path(), fields, arguments
    )
    return None


def _legal(name: str, value: Any) -> bool:
    if not isinstance(value, int):
        return False
    if name in _STAGES:
        return 1 <= value <= 4
    least, most = _SIZES.get(name, (1, 0))
    return least <= value <= most and value & (value - 1) == 0


def neighbours(call: Call, config: Any) -> list[Any]:
    """Configurations one step from this one: a size halved or doubled, a stage more or less."""
    _, fixed = _functions[call[0]]
    found = []
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        # a block that holds a whole row keeps its size
        if name in fixed or (name == "BLOCK_V" and config.ONE):
            continue
        if name in _STAGES:
            others = (value - 1, value + 1)
        elif name in _SIZES:
            others = (value // 2, value * 2)
        else:
            continue
        found += [dataclasses.replace(config, **{name: n}) for n in others if _legal(name, n)]
    return found


def own(call: Call) -> Any:
    """The function's own configuration for the call, or None if it has none."""
    return _functions[call[0]][0](*call[1])


def in_force(call: Call) -> Any:
    """The configuration that this call gets now."""
    return _winners.get(call) or own(call)


@contextmanager
def trying(call: Call, config: Any) -> Iterator[None]:
    """A context in which the call gets this configuration."""
    before = _winners.get(call)
    _winners[call] = config
    try:
        yield
    finally:
        adopt(call, before)


def adopt(call: Call, config: Any) -> None:
    """Use this configuration for the call from now on; None restores the function's own."""
    if config is None:
        _winners.pop(call, None)
    else:
        _winners[call] = config


@contextmanager
def asking() -> Iterator[set[Call]]:
    """A context that collects every call."""
    global _asked
    _asked = set()
    try:
        yield _asked
    finally:
        _asked = None


def readable(call: Call) -> str:
    """A call as text."""
    name, arguments = call
    shown = (
        str(a).removeprefix("torch.") if isinstance(a, torch.dtype) else str(a) for a in arguments
    )
    return f"{name} {' '.join(shown)}"


def shown(config: Any) -> str:
    """A configuration's sizes and stages as text."""
    numbers = {k: v for k, v in vars(config).items() if k in _SIZES or k in _STAGES}
    return ", ".join(f"{k} {v}" for k, v in numbers.items())
