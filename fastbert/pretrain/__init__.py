"""Pretraining: settings, data, masked words and next sentences, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastbert._lazy import lazy
from fastbert.pretrain.config import PretrainConfig

if TYPE_CHECKING:
    from fastbert.pretrain.run import Result, pretrain

__all__ = ["PretrainConfig", "Result", "pretrain"]

# the settings, which `fastbert --help` needs, are imported at once and need no torch
__getattr__ = lazy(
    __name__,
    {"Result": "fastbert.pretrain.run", "pretrain": "fastbert.pretrain.run"},
)
