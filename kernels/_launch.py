"""Launch configurations of the row kernels: pure functions, tested without a GPU.

An architecture is 80, 90, 100 ... (NVIDIA's compute capability times ten) or AMD's name, such as "gfx942".
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from fastbert.kernels import INTERPRETED
from fastbert.kernels._configured import configured

Arch = int | str
# Triton 3.10 fuses multiply-adds only in launches that set this; every configuration does
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Rows:
    """Whole rows in registers: ROWS rows of BLOCK_C columns in a program."""

    ROWS: int
    BLOCK_C: int
    num_warps: int
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class PersistentRows:
    """Like Rows, for a program that loops over rows; its loads run STAGES - 1 steps ahead."""

    ROWS: int
    BLOCK_C: int
    STAGES: int
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
    """The architecture that kernels on this device are compiled for."""
    return 80 if INTERPRETED else _properties(device.index)[0]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 2 under the interpreter, so that persistent kernels loop."""
    return 2 if INTERPRETED else _properties(device.index)[1]


def _warps(width: int, most: int, arch: Arch) -> int:
    """The fewest warps that hold a row at `most` elements a thread: a single warp sums it without a barrier."""
    lanes = 64 if isinstance(arch, str) else 32
    return min(16, triton.next_power_of_2(triton.cdiv(width, lanes * most)))


@configured()
def rows(width: int, arch: Arch) -> Rows:
    """One warp for a row of up to 1024 elements (AMD: 2048), more for a wider one."""
    return Rows(1, max(16, triton.next_power_of_2(width)), _warps(width, 32, arch))


@configured()
def persistent_rows(
    width: int, arch: Arch, gathers: bool = False, reads: int = 2
) -> PersistentRows:
    """One warp for a row of up to 768 elements (AMD: 1536): a backward also holds the sums of two gradients.

    With `gathers` loads wait for ids: running ahead gains little then, and nothing on Hopper. `reads` is the number of
    tensors whose rows are loaded ahead, into shared memory on NVIDIA.
    """
    block, warps = max(16, triton.next_power_of_2(width)), _warps(width, 24, arch)
    stages = 3 if not gathers else 1 if arch == 90 else 2
    if block == 8192 and arch == 100:
        # a row this wide leaves no registers for loads ahead
        stages = 1
    elif block == 8192 and reads > 2:
        # three stages of three fp32 rows do not fit Ampere's shared memory
        stages = min(stages, 2)
    two = arch == 90 and warps == 2 and block == 1024
    return PersistentRows(2 if two else 1, block, stages, warps)


def programs(count: int, config: PersistentRows, device: torch.device, warps: int = 8) -> int:
    """How many programs share `count` rows: at most one per 2 ROWS rows, and `warps` warps per multiprocessor."""
    most = max(1, warps // config.num_warps) * multiprocessors(device)
    return max(1, min(triton.cdiv(count, 2 * config.ROWS), most))
