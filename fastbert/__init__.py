"""fastbert: fused kernels and drop-in modules for BERT-class encoders.

The names below are imported when they are first used: `import fastbert` imports no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.backend import debug, use
    from fastbert.freeze import freeze, frozen_bytes, unfreeze
    from fastbert.integrations.accelerate import accelerate, restore
    from fastbert.integrations.validate import validate
    from fastbert.tune import tune
    from fastbert.tuning.explain import explain

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "accelerate",
    "debug",
    "explain",
    "freeze",
    "frozen_bytes",
    "restore",
    "tune",
    "unfreeze",
    "use",
    "validate",
]

_MODULES = {
    "accelerate": "fastbert.integrations.accelerate",
    "debug": "fastbert.backend",
    "explain": "fastbert.tuning.explain",
    "freeze": "fastbert.freeze",
    "frozen_bytes": "fastbert.freeze",
    "restore": "fastbert.integrations.accelerate",
    "tune": "fastbert.tune",
    "unfreeze": "fastbert.freeze",
    "use": "fastbert.backend",
    "validate": "fastbert.integrations.validate",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    elif name.startswith("__"):
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    else:
        module = f"fastbert.{name}"
        try:
            value = import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module 'fastbert' has no attribute {name!r}") from None
    globals()[name] = value
    return value


class _Package(ModuleType):
    """`fastbert.freeze` and `fastbert.tune` are functions, also after an import of modules of these names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
