"""fastbert: fused kernels and drop-in modules for BERT-class encoders.

The names below are imported when they are first used: `import fastbert` imports no torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastbert._lazy import find_moved, lazy

if TYPE_CHECKING:
    from fastbert.backend.chooser import debug, use
    from fastbert.compress.prune import prune
    from fastbert.compress.trim import trim
    from fastbert.integrations.accelerate import accelerate, restore
    from fastbert.integrations.validate import validate
    from fastbert.runners.freeze import freeze, frozen_bytes, quantize, unfreeze, weight_bytes
    from fastbert.runners.generate import generate
    from fastbert.tuning.explain import explain
    from fastbert.tuning.measure import tune

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "accelerate",
    "debug",
    "explain",
    "freeze",
    "frozen_bytes",
    "generate",
    "prune",
    "quantize",
    "restore",
    "trim",
    "tune",
    "unfreeze",
    "use",
    "validate",
    "weight_bytes",
]

_NAMES = {
    "accelerate": "fastbert.integrations.accelerate",
    "debug": "fastbert.backend.chooser",
    "explain": "fastbert.tuning.explain",
    "freeze": "fastbert.runners.freeze",
    "frozen_bytes": "fastbert.runners.freeze",
    "generate": "fastbert.runners.generate",
    "prune": "fastbert.compress.prune",
    "quantize": "fastbert.runners.freeze",
    "restore": "fastbert.integrations.accelerate",
    "trim": "fastbert.compress.trim",
    "tune": "fastbert.tuning.measure",
    "unfreeze": "fastbert.runners.freeze",
    "use": "fastbert.backend.chooser",
    "validate": "fastbert.integrations.validate",
    "weight_bytes": "fastbert.runners.freeze",
}
__getattr__ = lazy(__name__, _NAMES)
find_moved()


class _Package(ModuleType):
    """Keeps `fastbert.freeze` and `fastbert.tune` functions when the modules of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _NAMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
