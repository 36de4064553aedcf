"""Launch configurations of the row kernels: pure functions, tested without a GPU.

An architecture is 80, 90, 100 ... (NVIDIA's compute capability times ten) or AMD's name, such as "gfx942".
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from fastbert.kernels import INTERPRETED

Arch = int | str
# Triton 3.10 turns fused multiply-add off where a launch does not ask for it; every configuration does
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Rows:
    """Whole rows in registers: ROWS of them in a program, BLOCK_C columns each."""

    ROWS: int
    BLOCK_C: int
    num_warps: int
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class Tiles:
    """BLOCK_M x BLOCK_N elements."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    enable_fp_fusion: bool = True


@functools.cache
def _properties(index: int) -> tuple[Arch, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def arch(device: torch.device) -> Arch:
    """The architecture that a tensor's kernels are compiled for."""
    return 80 if INTERPRETED else _properties(device.index)[0]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 2 under the interpreter, so that persistent kernels loop."""
    return 2 if INTERPRETED else _properties(device.index)[1]


@functools.cache
def rows(width: int) -> Rows:
    """16 to 32 elements in a thread's registers: a warp for a row of 768 or 1024, more of them for wider ones."""
    block = max(16, triton.next_power_of_2(width))
    if block <= 1024:
        return Rows(min(32, 4096 // block), block, 4)
    return Rows(1, block, min(16, block // 512))


@functools.cache
def persistent_rows(width: int) -> Rows:
    """As `rows`, at 16 elements a thread: a backward keeps sums of two gradients beside the rows."""
    block = max(16, triton.next_power_of_2(width))
    if block <= 1024:
        return Rows(min(32, 4096 // block), block, 8)
    return Rows(1, block, min(16, block // 256))


def programs(count: int, config: Rows, device: torch.device) -> int:
    """How many programs of a persistent kernel share `count` rows: at most two per multiprocessor."""
    return max(1, min(triton.cdiv(count, config.ROWS), 2 * multiprocessors(device)))
