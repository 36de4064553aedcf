"""Pretraining: settings, the loop, checkpoints that resume bitwise, evaluation, the demo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastbert.train.config import PretrainConfig

if TYPE_CHECKING:
    from fastbert.train.run import Result, pretrain

__all__ = ["PretrainConfig", "Result", "pretrain"]


def __getattr__(name: str) -> Any:
    # the settings alone, which `fastbert --help` needs, are there without waiting for torch
    if name in ("Result", "pretrain"):
        from fastbert.train import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
