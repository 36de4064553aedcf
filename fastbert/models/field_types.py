"""The types of a dataclass's fields, checked at run time."""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral, Real
from typing import Any

from fastbert.files import quoted

# type in an annotation -> type of a value, and its name in messages
_TYPES: dict[str, tuple[Any, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "dict": (dict, "a JSON object"),
    "tuple": ((tuple, list), "a list"),
}


def check_types(settings: Any) -> None:
    """Raise ValueError for a field of a dataclass whose value is not of the field's type."""
    for f in dataclasses.fields(settings):
        value, (kind, *optional) = getattr(settings, f.name), str(f.type).split(" | ")
        wanted, called = _TYPES[kind.partition("[")[0]]
        fits = isinstance(value, wanted) and (kind == "bool") == isinstance(value, bool)
        fits = fits and (not isinstance(value, Real) or math.isfinite(value))
        if not fits and not (optional and value is None):
            raise ValueError(f"{f.name} is {quoted(value)}: it must be {called}")
