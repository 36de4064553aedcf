"""The native CPU backend: adapters from torch tensors to the raw-pointer kernels in csrc/cpu.

`native` is the native module; where there is none, `unavailable` says why, else it is None. The instruction set is the
best one of the machine, or FASTBERT_CPU_ISA; `misset` says why that variable or FASTBERT_KEEP_MEMORY cannot be met.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

# torch first: its OpenMP runtime is then mapped
import torch
from torch import Tensor

from fastbert.backend import _common
from fastbert.backend.torch_private import LIBRARY
from fastbert.files import quoted

# numbers of the element types in csrc/cpu/runtime.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# numbers of the activations there, and of GELU's forms by the names of `approximate`
ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2, "silu": 3, "gelu_sigmoid": 4}
GELUS = {"none": 1, "tanh": 2, "sigmoid": 4}


class _Symbol(ctypes.Structure):
    """dladdr's result for an address."""

    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _share_openmp() -> None:
    """Make the OpenMP runtime that torch is bound to visible to the native module, even where others are loaded.

    The module is not linked to a runtime of its own: two of them in one process oversubscribe the cores.
    """
    if not sys.platform.startswith("linux"):
        return
    # looked up in torch's own dependencies
    symbol = getattr(ctypes.CDLL(LIBRARY), "omp_get_max_threads", None)
    found = _Symbol(path=b"libgomp.so.1")
    if symbol is not None:
        ctypes.CDLL(None).dladdr(symbol, ctypes.byref(found))
    ctypes.CDLL(os.fsdecode(found.path), mode=ctypes.RTLD_GLOBAL)


_isa = os.environ.get("FASTBERT_CPU_ISA")
_keep = os.environ.get("FASTBERT_KEEP_MEMORY", "1")


def _loaded() -> tuple[Any, str | None]:
    """The native module, on FASTBERT_CPU_ISA where it is set; or None and the reason. Refuses one of other sources."""
    try:
        _share_openmp()
        module = import_module("fastbert._cpu")
    except (ImportError, OSError) as error:
        return None, (
            f"the native module fastbert._cpu is not usable ({error}): install fastbert with a C++ "
            "compiler at hand, `pip install .` in a checkout"
        )
    _common.check_current(module)
    module.keep_memory(_keep != "0")
    try:
        if _isa:
            module.use_isa(_isa)
    except ValueError as error:
        return None, str(error)
    return module, None


if TYPE_CHECKING:
    # not None, for adapters: the chooser calls none of them where `unavailable` holds
    import fastbert._cpu as native

    unavailable: str | None
else:
    native, unavailable = _loaded()
misset = f"FASTBERT_CPU_ISA is {quoted(_isa)}: {unavailable}" if _isa and unavailable else None
if _keep not in ("0", "1"):
    misset = f"FASTBERT_KEEP_MEMORY is {quoted(_keep)}: set 0 or 1"


def fresh(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result, in the dtype of `like` or this one.

    Large memory gets 2 MB pages where it is new to the process, since page faults of 4 KB take longer than the kernel
    that writes it; and malloc keeps it from then on (docs/cpu.md, Memory).
    """
    made = like.new_empty(shape, dtype=dtype)
    if made.nbytes >= native.LARGE:
        native.large_pages(made.data_ptr(), made.nbytes)
    return made


def unsupported_dtype(name: str, t: Tensor) -> str | None:
    """Why no kernel here takes a tensor of this dtype, or None."""
    if unavailable is not None:
        return unavailable
    if t.dtype not in DTYPES:
        return f"{name} is {t.dtype} and the cpu kernels take float32 and bfloat16: cast it, or use the torch backend"
    return None


def unsupported_parameter(name: str, p: Tensor) -> str | None:
    """Why a parameter can't be prepacked and watched for changes, None if it can be."""
    if p.dtype not in DTYPES:
        return unsupported_dtype(name, p)
    if p.device.type != "cpu":
        return f"{name} is on {p.device}"
    if p.is_inference():
        return (
            f"{name} was made in inference mode and counts no writes, load the model outside of it"
        )
    return None


address, int64 = _common.address, _common.int64
dropout_args = _common.native_dropout_args
unsupported_dropout = partial(_common.unsupported_dropout, "cpu")


def fp32(t: _common.Given) -> _common.Given:
    """A contiguous fp32 tensor of the same values."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.to(torch.float32).contiguous()


def row_losses(
    run: Callable[..., None],
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The loss of each row and lse, (N,) fp32, both 0 in ignored rows.

    `run` is native.cross_entropy_fwd, or cross_entropy_inplace, which overwrites the logits by softmax - onehot.
    """
    count, size = logits.shape
    loss, lse = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    if count > 0:
        labels64 = int64(labels)
        run(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            address(labels64),
            loss.data_ptr(),
            lse.data_ptr(),
            count,
            size,
            ignore_index,
            torch.get_num_threads(),
        )
    return loss, lse
