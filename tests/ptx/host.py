"""The machine as a device: the triton and cuda backends run on CPU tensors, their kernels on the machine.

Inside `on_machine(name)` the backend takes CPU tensors as a GPU's. A tensor whose address an adapter reads becomes a
buffer: its own bytes are legal, the rest of its storage is not. Memory from torch.empty and the like counts as
unwritten until a kernel or torch writes it.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastbert.backend import chooser
from ptx import cuda_host
from ptx.machine import launch
from ptx.memory import LEGAL, WRITTEN, Buffer, Counts, PtxError
from ptx.program import Program, parse

# multiprocessors for persistent kernels: few, so that their loops run more than once
MULTIPROCESSORS = 2
_FRESH = (
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
)


_OPERATORS = {f"__{op}__" for op in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")}


@dataclass
class Launch:
    """One kernel that ran: its name, its grid and threads, and its counts."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    counts: Counts


class Tensors(TorchFunctionMode):
    """Records from torch's calls which tensors go to kernels, and which of their bytes are written."""

    def __init__(self) -> None:
        super().__init__()
        # address of a storage -> (the storage, kept alive; its bytes and their states)
        self.found: dict[int, tuple[torch.UntypedStorage, Buffer]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run torch's function, and record the memory that it makes, writes or passes to a kernel."""
        kwargs = kwargs or {}
        if function is torch.autograd.grad:
            # torch switches a mode off in its own handler; backward's calls must be recorded too
            with self, mock.patch.object(torch.autograd, "has_torch_function", _no):
                return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if function is Tensor.data_ptr:
            self._expose(args[0])
        elif function in _FRESH:
            self._buffer(result, 0)
        elif _in_place(function.__name__) and args:
            self._written(args[0])
        elif kwargs.get("out") is not None:
            self._written(kwargs["out"])
        return result

    @property
    def buffers(self) -> list[Buffer]:
        """The memory that a launch may access."""
        return [buffer for _, buffer in self.found.values()]

    def _expose(self, t: Tensor) -> None:
        if t.numel():
            self._states(t).bitwise_or_(LEGAL)

    def _written(self, t: Any) -> None:
        if not isinstance(t, Tensor):
            for one in t if isinstance(t, (list, tuple)) else ():
                self._written(one)
        elif t.numel() and t.untyped_storage().data_ptr() in self.found:
            self._states(t).bitwise_or_(WRITTEN)

    def _states(self, t: Tensor) -> Tensor:
        """The states of the tensor's own bytes, (*shape, bytes of an element)."""
        with torch._C.DisableTorchFunction():
            size = t.element_size()
            states = torch.from_numpy(self._buffer(t, WRITTEN).state)
            strides = [s * size for s in t.stride()]
            return states.as_strided((*t.shape, size), (*strides, 1), t.storage_offset() * size)

    def _buffer(self, t: Tensor, state: int) -> Buffer:
        storage = t.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.found:
            data = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
            name = f"{str(t.dtype)[6:]}{list(t.shape)}"
            buffer = Buffer(address, data, np.full(size, state, np.uint8), name)
            self.found[address] = storage, buffer
        return self.found[address][1]


@contextmanager
def on_machine(name: str) -> Iterator[list[Launch]]:
    """Inside, the backend `name` takes CPU tensors; the list grows by each kernel that ran. PtxError ends a call."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(chooser._DEVICES, {name: "cpu"}))
        tensors = Tensors()
        for patch in (_triton if name == "triton" else _cuda)(tensors, launches):
            stack.enter_context(patch)
        stack.enter_context(tensors)
        yield launches


def _cuda(tensors: Tensors, launches: list[Launch]) -> Iterator[Any]:
    """Patches with which fastbert.backend.cuda runs its own host code, and its kernels on the machine."""

    def run(kernel: str, grid: list[int], block: list[int], shared: int, given: list[int]) -> None:
        program = cuda_host.program(kernel)
        sizes = [v.size for v in program.functions[kernel].parameters]
        arguments = [ctypes.string_at(a, n) for a, n in zip(given, sizes, strict=True)]
        try:
            counts = launch(program, kernel, grid, block, arguments, tensors.buffers, shared)
        except PtxError as error:
            where = cuda_host.line(*error.place) if error.place else ""
            raise PtxError(error.kind, f"{error} ({where})", error.place) from error
        threads = int(np.prod(block))
        launches.append(Launch(cuda_host.plain(kernel), tuple(grid), threads, counts))

    native = cuda_host.Native(run)
    for module in cuda_host.modules():
        replaced = {"native": native, "place": lambda t: (0, 0), "multiprocessors": _few}
        for attribute, value in replaced.items():
            if hasattr(module, attribute):
                yield mock.patch.object(module, attribute, value)


def _in_place(name: str) -> bool:
    """Whether torch's function of this name writes its first argument: zero_, __setitem__, __iadd__ and the like."""
    if name.endswith("__"):
        return name == "__setitem__" or f"__{name[3:]}" in _OPERATORS
    return name.endswith("_") and name not in ("requires_grad_", "detach_")


def _no(arguments: object) -> bool:
    return False


def _few(index: object) -> int:
    return MULTIPROCESSORS


_PACKED = {"i1": "?", "u1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q"}
_PACKED |= {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


@cache
def _parsed(ptx: str) -> Program:
    return parse(ptx)


def _triton(tensors: Tensors, launches: list[Launch]) -> Iterator[Any]:
    """Patches with which Triton's launches compile for sm_80 and run on the machine."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastbert.kernels import _launch
    from fastbert.testing import aot

    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        result = compile_only(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False)) | options
        arguments = []
        for name, kind in result.src.signature.items():
            if kind.startswith("*"):
                arguments.append(struct.pack("<Q", given[name].data_ptr()))
            elif kind != "constexpr":
                arguments.append(struct.pack(f"<{_PACKED[kind]}", given[name]))
        # two null pointers to scratch memory, which our kernels do not use
        arguments += [bytes(8)] * 2
        program = _parsed(result.asm["ptx"])
        (kernel,) = (f.name for f in program.functions.values() if f.entry)
        shape = tuple(grid(given) if callable(grid) else grid)
        threads = 32 * result.metadata.num_warps
        shared = result.metadata.shared
        counts = launch(program, kernel, shape, (threads,), arguments, tensors.buffers, shared)
        launches.append(Launch(kernel, shape, threads, counts))
        return result

    yield mock.patch.object(driver, "_active", aot._Driver(80))
    yield mock.patch.object(JITFunction, "run", run)
    yield mock.patch.object(_launch, "arch", return_value=80)
    yield mock.patch.object(_launch, "multiprocessors", _few)


__all__ = ["Launch", "PtxError", "on_machine"]
