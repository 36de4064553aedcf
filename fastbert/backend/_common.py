"""What adapters of several backends share; importing it has no side effects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastbert.backend.names import StaleModuleError

# a tensor or None, and the same for the result
Given = TypeVar("Given", Tensor, Tensor | None)
# elements in the widest row that a GPU kernel holds in registers
MAX_WIDTH = 8192


def stale(module: Any, why: str) -> StaleModuleError:
    """The error for a native module that does not belong to this version of fastbert."""
    return StaleModuleError(
        f"the native module {module.__file__} was built from other sources than this version of fastbert, {why}: build "
        "it again, `pip install .` in the checkout"
    )


def check_current(module: Any) -> None:
    """Compare a native module with its stub, such as _cpu.pyi: names, and each function's number of arguments.

    Raises StaleModuleError at the first difference.
    """
    name = module.__name__.rpartition(".")[2]
    file = Path(__file__).parents[1] / f"{name}.pyi"
    # programs that bundle packages leave stubs out
    stub = file.read_text(encoding="utf-8") if file.is_file() else ""
    for constant in re.findall(r"^(\w+): ", stub, re.M):
        if not hasattr(module, constant):
            raise stale(module, f"it has no {constant}")
    for function, arguments in re.findall(r"^def (\w+)\(([^)]*)\)", stub, re.M):
        if not hasattr(module, function):
            raise stale(module, f"it has no {function}")
        wanted = arguments.count(":")
        # pybind11 writes the signature there
        taken = len(re.findall(r"\barg\d+:", getattr(module, function).__doc__ or ""))
        if taken != wanted:
            raise stale(module, f"its {function} takes {taken} arguments, not {wanted}")


def unsupported_dropout(backend: str, p: float) -> str | None:
    """Why no native kernel takes this dropout probability, or None."""
    if p > 1 - 2**-32:
        return f"p is {p}: the {backend} kernel compares 32-bit words, pass p <= 1 - 2**-32"
    return None


def unsupported_width(backend: str, width: int) -> str | None:
    """Why no GPU kernel that keeps a row of this many elements in registers takes it, or None."""
    if not 0 < width <= MAX_WIDTH:
        return (
            f"a row has {width} elements and the {backend} kernels hold 1 to {MAX_WIDTH} in registers: "
            "use the torch backend"
        )
    return None


def picked(hidden: Tensor, rows: Tensor | None) -> Tensor:
    """These rows of hidden (T, C), or all of them."""
    return hidden if rows is None else hidden.index_select(0, rows)


def int64(t: Given) -> Given:
    """A contiguous int64 tensor of the same values."""
    if t is None or (t.dtype == torch.int64 and t.is_contiguous()):
        return t
    return t.to(torch.int64).contiguous()


def address(t: Tensor | None) -> int:
    """Where the tensor's memory starts, 0 for None."""
    return 0 if t is None else t.data_ptr()


def dropout_args(p: float, seed: Tensor | None, site: int) -> tuple[Tensor | None, int, int, float]:
    """A kernel's seed (None: no dropout), site, threshold and scale."""
    if p == 0.0 or seed is None:
        return None, 0, 0, 1.0
    return seed, site, round(p * 2**32), 1.0 / (1.0 - p)


def native_dropout_args(p: float, seed: Tensor | None, site: int) -> tuple[int, int, int, float]:
    """The same with the address of the seed (0: no dropout), as the native modules take it."""
    tensor, site, threshold, scale = dropout_args(p, seed, site)
    return address(tensor), site, threshold, scale


def unsupported_gelu(approximate: str) -> str | None:
    """Why GPU kernels have no such form of GELU, None if they have it."""
    if approximate == "sigmoid":
        return "approximate is 'sigmoid', for which there is no GPU kernel: use the torch backend"
    return None
