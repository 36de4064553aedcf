"""Distillation: a small model learns from a large one, on text, on labelled data or on sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastbert._lazy import lazy
from fastbert.distil.config import DistilConfig

if TYPE_CHECKING:
    from fastbert.distil.run import Result, distil

__all__ = ["DistilConfig", "Result", "distil"]

# the settings, which `fastbert --help` needs, are imported at once and need no torch
__getattr__ = lazy(
    __name__,
    {"Result": "fastbert.distil.run", "distil": "fastbert.distil.run"},
)
