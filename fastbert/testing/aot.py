"""The Triton kernels compiled for GPUs that this machine lacks: registers, spills, shared memory, machine code.

`compiled(arch, call)` runs an adapter on meta tensors with Triton's launches replaced by compilations for that
architecture. The specialisation is that of a real launch, and an adapter that reads a tensor's values fails.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastbert.kernels import _launch

ARCHS: tuple[_launch.Arch, ...] = (80, 90, 100, "gfx942")
# bytes of shared memory that one block may have: compute capabilities 8.0, 9.0, 10.0 and CDNA 3's LDS
SHARED = {80: 166_912, 90: 232_448, 100: 232_448, "gfx942": 65_536}
# registers and threads of a multiprocessor
REGISTERS, THREADS = 65_536, 2_048
# names of instructions: products of matrices on Ampere's, Hopper's and Blackwell's tensor cores and CDNA's matrix
# cores; accesses of 16 bytes a lane
MATRIX = r"([HI]G?MMA|UTC\w*MMA)\b.*|v_mfma_.*"
WIDE = r"(LDG|STG)\.E\.128.*|(global|buffer)_(load|store)_dwordx4"
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. `constants` are its tile sizes and flags, `shared` and `spilled` are bytes."""

    name: str
    arch: _launch.Arch
    dtype: str
    constants: dict[str, Any]
    warps: int
    registers: int
    spilled: int
    shared: int
    # a disassembler takes half a second
    disassemble: Callable[[], str]

    @cached_property
    def assembly(self) -> str:
        """The machine code as text."""
        return self.disassemble()

    @cached_property
    def opcodes(self) -> dict[str, int]:
        """The number of each instruction in the machine code, by its whole name."""
        found: dict[str, int] = {}
        pattern = (
            r"^\s+(\w+)"
            if self.arch == "gfx942"
            else r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)"
        )
        for full in re.findall(pattern, self.assembly, re.MULTILINE):
            found[full] = found.get(full, 0) + 1
        return found

    def count(self, pattern: str) -> int:
        """The number of instructions whose whole name matches."""
        return sum(n for name, n in self.opcodes.items() if re.fullmatch(pattern, name))

    @property
    def occupancy(self) -> float:
        """Share of an NVIDIA multiprocessor's threads that registers and shared memory let live at once."""
        lanes = 32 * self.warps
        by_registers = REGISTERS // (max(self.registers, 1) * lanes)
        by_shared = SHARED[self.arch] // self.shared if self.shared else by_registers
        return min(by_registers, by_shared, THREADS // lanes, 32) * lanes / THREADS


class _Driver:
    """A stand-in for the driver of a GPU of one architecture: it can compile but not run."""

    def __init__(self, arch: _launch.Arch) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.arch, str):
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # a JITFunction caches compiled kernels by device number
        return ARCHS.index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(arch: _launch.Arch) -> Iterator[list[tuple[JITFunction, Any, dict[str, Any]]]]:
    """Inside, launches compile for `arch` and append (function, compiled kernel, keyword arguments) to the list."""
    launches: list[tuple[JITFunction, Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        result = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self, result, options))
        return result

    with (
        mock.patch.object(driver, "_active", _Driver(arch)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(_launch, "arch", return_value=arch),
        mock.patch.object(_launch, "multiprocessors", return_value=108),
    ):
        yield launches


def compiled(arch: _launch.Arch, call: Callable[[], object], dtype: str = "") -> list[Kernel]:
    """Every kernel that call() would launch, once each."""
    with recording(arch) as launches:
        call()
    found = {id(result): (function, result, options) for function, result, options in launches}
    return [_inspect(arch, dtype, *launch) for launch in found.values()]


def _inspect(
    arch: _launch.Arch, dtype: str, function: JITFunction, result: Any, options: dict[str, Any]
) -> Kernel:
    constants = {
        k: v for k, v in options.items() if k not in ("debug", "num_warps", "enable_fp_fusion")
    }
    read = _amd if isinstance(arch, str) else _nvidia
    registers, spilled, disassemble = read(result.asm)
    shared, warps = result.metadata.shared, result.metadata.num_warps
    return Kernel(
        function.__name__, arch, dtype, constants, warps, registers, spilled, shared, disassemble
    )


def _nvidia(asm: dict[str, Any]) -> tuple[int, int, Callable[[], str]]:
    """Registers of a thread, bytes of its stack that spills take, and what makes the SASS."""
    usage = _tool(asm["cubin"], "cuobjdump", "-res-usage")
    numbers = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    sass = partial(_tool, asm["cubin"], "nvdisasm", "-c")
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], sass


def _amd(asm: dict[str, Any]) -> tuple[int, int, Callable[[], str]]:
    """Vector registers of a lane, bytes that spills take, and what gives the GCN assembly."""
    text = asm["amdgcn"]
    numbers = {key: int(n) for key, n in re.findall(r"\.(\w+_count|\w+_size):\s*(\d+)", text)}
    # scalar registers that do not fit lie in lanes of vector registers, not in memory
    spilled = 4 * numbers["vgpr_spill_count"] + numbers["private_segment_fixed_size"]
    return numbers["vgpr_count"], spilled, lambda: text


def _tool(cubin: bytes, name: str, *arguments: str) -> str:
    """The output of one of NVIDIA's tools, which read files only."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_BIN / name), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
