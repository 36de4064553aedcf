"""The CUDA C++ backend: adapters from torch tensors to the raw-pointer kernels in csrc/cuda.

`native` is the native module, which imports on a machine without a GPU too; `unavailable` says why it is not usable,
else it is None. Adapters read metadata only and launch on torch's current stream, in torch's memory. Without a host
sync, a CUDA graph can capture a forward and a backward.
"""

from __future__ import annotations

import functools
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastbert.backend import _common
from fastbert.backend._gpu_mlm_loss import loss_width as loss_width
from fastbert.backend.torch_private import raw_stream

# numbers of the element types in csrc/cuda/types.cuh
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# the chooser reads these, and loss_width above
starts_on_current_device = True
captured = True
OLDEST = (8, 0)


def _loaded() -> tuple[Any, str | None]:
    """The native module, None where it was not built, and why it is not usable."""
    try:
        module = import_module("fastbert._cuda")
    except ImportError as error:
        return None, (
            f"the native module fastbert._cuda is not usable ({error}): install fastbert with nvcc at hand, the CUDA "
            "toolkit's or the wheels nvidia-cuda-nvcc and nvidia-cuda-cccl, by FASTBERT_CUDA=1 `pip install .` in a "
            "checkout; `make demo` leaves the module out where nvidia-smi lists no GPU"
        )
    _common.check_current(module)
    if torch.version.hip:
        reason = "this torch is for AMD's GPUs, which CUDA does not run on: use the triton backend"
        return module, reason
    return module, None


if TYPE_CHECKING:
    # not None, for adapters: the chooser calls none of them where `unavailable` holds
    import fastbert._cuda as native

    unavailable: str | None
else:
    native, unavailable = _loaded()


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def multiprocessors(index: int) -> int:
    """How many multiprocessors this GPU has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def unsupported_dtype(**tensors: Tensor | None) -> str | None:
    """Why no kernel here takes these tensors, or None."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in DTYPES:
            return (
                f"{name} is {t.dtype} and the cuda kernels take float32, bfloat16 and float16: "
                "cast it, or use the torch backend"
            )
        # a tracer must not query the device
        if torch.compiler.is_compiling() or not t.is_cuda:
            continue
        if _capability(t.get_device()) < OLDEST:
            return (
                f"{name} is on a GPU of compute capability {_capability(t.get_device())} and the cuda kernels need "
                f"{OLDEST} or later: use the torch backend"
            )
    return None


address, int64 = _common.address, _common.int64
dropout_args = _common.native_dropout_args
unsupported_width = partial(_common.unsupported_width, "cuda")
unsupported_dropout = partial(_common.unsupported_dropout, "cuda")


def parameter(t: Tensor | None, like: torch.dtype) -> Tensor | None:
    """The parameter contiguous and in fp32 or the activations' dtype, which the kernels read; most are."""
    if t is None:
        return None
    if t.dtype not in (torch.float32, like):
        t = t.to(torch.float32)
    return t.contiguous()


def code(t: Tensor | None) -> int:
    """The number of the tensor's element type, 0 for None."""
    return 0 if t is None else DTYPES[t.dtype]


def place(t: Tensor) -> tuple[int, int]:
    """The index of the tensor's GPU and the handle of the stream that torch fills there."""
    index = t.get_device()
    return index, raw_stream(index)


def row_partials(x: Tensor, sums: int = 2) -> Tensor:
    """Memory for the partial sums (sums, blocks, C) fp32 that the blocks of a backward over x (N, C) write."""
    N, C = x.shape
    count = multiprocessors(x.get_device())
    blocks = native.row_blocks(N, C, DTYPES[x.dtype], count)
    return x.new_empty(sums, blocks, C, dtype=torch.float32)


def column_partials(x: Tensor) -> Tensor:
    """Memory for the partial sums (blocks, F) fp32 that the blocks of a kernel over x (N, F) write."""
    N, F = x.shape
    count = multiprocessors(x.get_device())
    blocks = native.column_blocks(N, F, DTYPES[x.dtype], count)
    return x.new_empty(blocks, F, dtype=torch.float32)
