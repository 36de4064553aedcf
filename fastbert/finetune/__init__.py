"""Fine-tuning on labelled data: text classification, token classification, extractive question answering."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastbert._lazy import lazy
from fastbert.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from fastbert.finetune.predict import Predictor
    from fastbert.finetune.run import Result, finetune

__all__ = ["FinetuneConfig", "Predictor", "Result", "finetune"]

# the settings, which `fastbert --help` needs, are imported at once and need no torch
__getattr__ = lazy(
    __name__,
    {
        "Predictor": "fastbert.finetune.predict",
        "Result": "fastbert.finetune.run",
        "finetune": "fastbert.finetune.run",
    },
)
