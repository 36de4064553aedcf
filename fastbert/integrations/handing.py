"""Hands a value of ours to a module whose caller, transformers' code, leaves out arguments that it does not know."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NOTHING = object()


class _Handed(threading.local):
    value: Any = _NOTHING


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
    """The value that the caller of transformers' code hands over, once; `default` where there is none."""
    value, _handed.value = _handed.value, _NOTHING
    return default if value is _NOTHING else value
