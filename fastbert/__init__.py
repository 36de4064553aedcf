"""fastbert: fused kernels and drop-in modules for BERT-class encoders."""

from fastbert import backend, functional
from fastbert.backend import debug, explain, use
from fastbert.freeze import freeze, frozen_bytes, unfreeze
from fastbert.integrations.accelerate import accelerate, restore
from fastbert.integrations.validate import validate
from fastbert.tune import tune

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "accelerate",
    "backend",
    "debug",
    "explain",
    "freeze",
    "frozen_bytes",
    "functional",
    "restore",
    "tune",
    "unfreeze",
    "use",
    "validate",
]
