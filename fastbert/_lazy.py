"""Names and modules that are imported at their first use, and the modules of version 0.1 at their old names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any


def lazy(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: {name: module that defines it}, imported at the first use; then submodules.

    dir() of the package lists the names too.
    """

    def getattribute(name: str) -> Any:
        module = f"{package}.{name}"
        if name in names:
            value = getattr(import_module(names[name]), name)
        elif name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        else:
            try:
                value = import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
                raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
        setattr(here, name, value)
        return value

    here = sys.modules[package]
    here.__dir__ = lambda: sorted({*vars(here), *names})  # type: ignore[method-assign]
    return getattribute


# {module of version 0.1: where it is now}; scripts import these names, and pickles hold them
MOVED = {
    "fastbert.blocks": "fastbert.nn.blocks",
    "fastbert.cli_finetune": "fastbert.cli.finetune",
    "fastbert.cli_pretrain": "fastbert.cli.pretrain",
    "fastbert.cli_settings": "fastbert.cli.settings",
    "fastbert.cli_text": "fastbert.cli.text",
    "fastbert.cli_tune": "fastbert.cli.tune",
    "fastbert.checkpoint": "fastbert.models.checkpoint",
    "fastbert.config": "fastbert.models.config",
    "fastbert.cpu": "fastbert.backend.cpu",
    "fastbert.cuda": "fastbert.backend.cuda",
    "fastbert.freeze": "fastbert.runners.freeze",
    "fastbert.graphs": "fastbert.runners.inference",
    "fastbert.names": "fastbert.models.names",
    "fastbert.packing": "fastbert.nn.packing",
    "fastbert.reference": "fastbert.backend.reference",
    "fastbert.stock": "fastbert.backend.stock",
    "fastbert.testing.fetch": "fastbert.data.fetch",
    "fastbert.testing.machine": "fastbert.machine",
    "fastbert.testing.memory": "fastbert.integrations.memory",
    "fastbert.testing.samples": "fastbert.backend.reference.samples",
    "fastbert.train.baselines": "fastbert.pretrain.baselines",
    "fastbert.train.build": "fastbert.pretrain.build",
    "fastbert.train.config": "fastbert.pretrain.config",
    "fastbert.train.demo": "fastbert.cli.demo",
    "fastbert.train.evaluate": "fastbert.pretrain.evaluate",
    "fastbert.train.feed": "fastbert.pretrain.feed",
    "fastbert.train.initial": "fastbert.pretrain.initial",
    "fastbert.train.run": "fastbert.pretrain.run",
    "fastbert.training_graphs": "fastbert.runners.training",
    "fastbert.tune": "fastbert.tuning.measure",
    "fastbert.tuned": "fastbert.backend.tuned",
}


class _Finder(MetaPathFinder, Loader):
    """Finds a moved module, or one below a moved package, at its old name: it is the module at the new name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if (new := _new_name(name)) is None or (found := find_spec(new)) is None:
            return None
        # `python -m` takes __file__ from the origin
        return ModuleSpec(name, self, origin=found.origin)

    def get_code(self, name: str) -> CodeType | None:
        """The code that `python -m` runs."""
        spec = find_spec(str(_new_name(name)))
        assert spec is not None
        return spec.loader.get_code(spec.name)  # type: ignore[union-attr]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(str(_new_name(spec.name)))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the import system has put the old name's spec in place of the module's own
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _new_name(name: str) -> str | None:
    if name in MOVED:
        return MOVED[name]
    package, _, rest = name.rpartition(".")
    return f"{MOVED[package]}.{rest}" if package in MOVED else None


def find_moved() -> None:
    """Have imports find the moved modules, before an old folder that holds nothing but a __pycache__."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
