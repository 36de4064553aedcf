"""The native CPU backend: adapters from torch tensors to the raw-pointer kernels in csrc/cpu.

`unavailable` says why there is no native module (None when there is one); `native` is the module. The instruction
set is the best that the machine has, or FASTBERT_CPU_ISA; `misset` says why that one can't be had.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

# torch first: its OpenMP runtime is then mapped
import torch
from torch import Tensor

native: ModuleType | None
unavailable: str | None
misset: str | None

# numbers of the element types in csrc/cpu/runtime.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Symbol(ctypes.Structure):
    """What dladdr tells of an address."""

    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _share_openmp() -> None:
    """Make the OpenMP runtime that torch is bound to, whatever others are loaded, visible to the native module.

    The module is not linked to a runtime of its own: two of them in one process oversubscribe the cores.
    """
    if not sys.platform.startswith("linux"):
        return
    # looked up in torch's own dependencies
    symbol = getattr(ctypes.CDLL(torch._C.__file__), "omp_get_max_threads", None)
    found = _Symbol(path=b"libgomp.so.1")
    if symbol is not None:
        ctypes.CDLL(None).dladdr(symbol, ctypes.byref(found))
    ctypes.CDLL(os.fsdecode(found.path), mode=ctypes.RTLD_GLOBAL)


_isa = os.environ.get("FASTBERT_CPU_ISA")
try:
    _share_openmp()
    native = import_module("fastbert._cpu")
    if _isa:
        native.use_isa(_isa)
except (ImportError, OSError) as error:
    native = None
    unavailable = (
        f"the native module fastbert._cpu is not usable ({error}): install fastbert with a C++ "
        "compiler at hand, `pip install .` in a checkout"
    )
except ValueError as error:
    native = None
    unavailable = str(error)
else:
    unavailable = None
misset = f"FASTBERT_CPU_ISA is {_isa!r}: {unavailable}" if _isa and unavailable else None


def fresh(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result, in the dtype of `like` or this one.

    Where it is large it asks for 2 MB pages: malloc maps such memory anew each time, and 25,000 faults of 4 KB cost
    100 ms in a virtual machine, a third of the feed-forward's GEMM that writes the 100 MB.
    """
    made = like.new_empty(shape, dtype=dtype)
    if made.nbytes >= native.LARGE:  # type: ignore[union-attr]
        native.large_pages(made.data_ptr(), made.nbytes)  # type: ignore[union-attr]
    return made


def unsupported_dtype(name: str, t: Tensor) -> str | None:
    """Why no kernel here takes a tensor of this dtype, or None."""
    if unavailable is not None:
        return unavailable
    if t.dtype not in DTYPES:
        return f"{name} is {t.dtype} and the cpu kernels take float32 and bfloat16: cast it, or use the torch backend"
    return None


def unpackable(name: str, p: Tensor) -> str | None:
    """Why a parameter can't be copied once and watched for changes, None if it can be."""
    if p.dtype not in DTYPES:
        return unsupported_dtype(name, p)
    if p.device.type != "cpu":
        return f"{name} is on {p.device}"
    if p.is_inference():
        return (
            f"{name} was made in inference mode and counts no writes, load the model outside of it"
        )
    return None


def unsupported_dropout(p: float) -> str | None:
    """Why no kernel here takes this dropout probability, or None."""
    if p > 1 - 2**-32:
        return f"p is {p}: the cpu kernel compares 32-bit words, pass p <= 1 - 2**-32"
    return None


def fp32(t: Tensor | None) -> Tensor | None:
    """A contiguous fp32 tensor of the same values."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.to(torch.float32).contiguous()


def int64(t: Tensor | None) -> Tensor | None:
    """A contiguous int64 tensor of the same values."""
    if t is None or (t.dtype == torch.int64 and t.is_contiguous()):
        return t
    return t.to(torch.int64).contiguous()


def address(t: Tensor | None) -> int:
    """Where the tensor's memory starts, 0 for None."""
    return 0 if t is None else t.data_ptr()


def dropout_args(p: float, seed: Tensor | None, site: int) -> tuple[int, int, int, float]:
    """The native functions' seed address (0: no dropout), site, threshold and scale."""
    if p == 0.0 or seed is None:
        return 0, 0, 0, 1.0
    return seed.data_ptr(), site, round(p * 2**32), 1.0 / (1.0 - p)


def row_losses(
    run: Callable[
        ..., None
    ],  # native.cross_entropy_fwd, or _inplace, which overwrites the logits by softmax - onehot
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The loss of each row and lse, (N,) fp32, both 0 in ignored rows."""
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
