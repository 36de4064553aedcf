"""Fine-tuning on labelled data: text classification, token classification, extractive question answering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastbert.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from fastbert.finetune.predict import Predictor
    from fastbert.finetune.run import Result, finetune

__all__ = ["FinetuneConfig", "Predictor", "Result", "finetune"]


def __getattr__(name: str) -> Any:
    # the settings alone, which `fastbert --help` needs, are there without waiting for torch
    if name == "Predictor":
        from fastbert.finetune import predict

        return predict.Predictor
    if name in ("Result", "finetune"):
        from fastbert.finetune import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
