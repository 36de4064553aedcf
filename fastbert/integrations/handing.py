"""Passes a value from a forward of fastbert to the next, past a forward of transformers that drops its argument."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NOTHING = object()


class _Handed(threading.local):
    # an attribute of every thread's own from its beginning: torch.compile guards that it is there
    def __init__(self) -> None:
        self.value: Any = _NOTHING


_handed = _Handed()


@contextmanager
def handing(value: Any) -> Iterator[None]:
    """Inside, in this thread, the next `taken` returns the value."""
    _handed.value = value
    try:
        yield
    finally:
        _handed.value = _NOTHING


def taken(default: Any) -> Any:
    """The value of the enclosing `handing`, which the first call takes; `default` for later calls and without one."""
    value, _handed.value = _handed.value, _NOTHING
    return default if value is _NOTHING else value
