"""Launch configurations of the matrix kernels: pure functions of the shape's class, the dtype and the architecture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from fastbert.kernels._configured import configured
from fastbert.kernels._launch import Arch, Tiles


@dataclass(frozen=True)
class Attention:
    """Tiles of BLOCK_M queries and BLOCK_N keys, heads padded to BLOCK_D; PRECISION is that of fp32 products."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    PRECISION: str
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True


def head_block(D: int) -> int:
    """The head size padded for matrix instructions: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(D))


def precision(dtype: torch.dtype, arch: Arch) -> str:
    """The precision that keeps fp32's error budget: three TF32 products on NVIDIA's tensor cores, fp32 on AMD."""
    return "tf32x3" if dtype == torch.float32 and isinstance(arch, int) else "ieee"


def tile(length: int, most: int) -> int:
    """The smallest tile between 16 and `most` that holds `length`; it also names a class of lengths."""
    return min(most, max(16, triton.next_power_of_2(length)))


# Chosen by compiling (benchmarks/gpu/gpu_report.py): the largest tiles that do not spill on sm_80, sm_90, sm_100 and
# gfx942. Some for sm_90 were measured instead, and a few of backward spill there (docs/triton.md). Replaying dropout
# takes some 60 registers a thread.


@configured()
def attention_fwd(max_seqlen: int, D: int, dtype: torch.dtype, arch: Arch, drop: bool) -> Attention:
    """Short sequences get one tile of keys and small tiles of queries, so that little padding is computed."""
    block, exact = head_block(D), precision(dtype, arch)
    if dtype == torch.float32:
        if block > 64:
            return Attention(tile(max_seqlen, 32), 16, block, exact, 8, 1)
        stages = 1 if isinstance(arch, str) else 2
        return Attention(tile(max_seqlen, 32), tile(max_seqlen, 32), block, exact, 4, stages)
    amd, wide = isinstance(arch, str), block > 64
    if arch == 90 and not wide:
        # measured on an H200: with dropout, tiles of 32 keys leave enough registers to replay it
        if max_seqlen > 128:
            return Attention(64, 32 if drop else 64, block, exact, 4, 3)
        keys = tile(max_seqlen, 32 if drop else 128)
        return Attention(tile(max_seqlen, 64), keys, block, exact, 4, 2 if drop else 1)
    if max_seqlen <= 128:
        # Hopper's and Blackwell's instructions take 64 rows
        rows = 64 if not amd and (wide or arch in (90, 100)) else 32
        warps = 8 if wide and not amd else 4
        return Attention(tile(max_seqlen, rows), tile(max_seqlen, 128), block, exact, warps, 1)
    if amd:
        return Attention(64 if drop or wide else 128, 32, block, exact, 4, 2)
    if drop:
        return Attention(64, 64, block, exact, 4, 3 if arch == 80 and not wide else 2)
    return Attention(128, 64, block, exact, 8 if wide or arch == 80 else 4, 2)


@configured("BLOCK_N")
def attention_bwd(
    max_seqlen: int, D: int, dtype: torch.dtype, arch: Arch, drop: bool, bias: bool = False
) -> Attention | None:
    """Tiles of whole sequences; None if keys, values and both gradients do not fit registers and shared memory.

    NVIDIA, 16-bit: up to 128 tokens at D <= 64, 64 at D <= 128; a quarter of that in fp32 and on AMD.
    """
    block, exact = head_block(D), precision(dtype, arch)
    most = 128 * 64 // max(block, 64)
    small = dtype == torch.float32 or isinstance(arch, str)
    most = most // 4 if small else most
    if max_seqlen > most:
        return None
    keys = tile(max_seqlen, most)
    if arch == 90 and block == 64 and keys > 32 and dtype != torch.float32 and not bias:
        return Attention(32, keys, block, exact, 4, 1)
    if dtype == torch.float32 or (block <= 32 and keys == 128):
        return Attention(16, keys, block, exact, 4, 1)
    return Attention(tile(max_seqlen, 32), keys, block, exact, 4 if keys <= 32 else 8, 1)


def _loop(D: int, dtype: torch.dtype, arch: Arch) -> Attention | None:
    """Tiles of both backward loops in fp32 and on AMD, where registers are short; None elsewhere."""
    block, exact = head_block(D), precision(dtype, arch)
    wide = block > 64
    if dtype == torch.float32:
        keys = 16 if wide or (arch == 100 and block <= 32) else 32
        return Attention(16, keys, block, exact, 8 if wide else 4, 1)
    if isinstance(arch, str):
        return Attention(32, 32, block, exact, 8 if wide else 4, 1)
    return None


@configured()
def attention_bwd_dkdv(
    D: int, dtype: torch.dtype, arch: Arch, drop: bool, bias: bool = False
) -> Attention:
    """A program holds BLOCK_N keys and loops over queries; a tile of biases takes registers too."""
    block = head_block(D)
    if arch == 90 and block <= 64 and dtype != torch.float32 and not bias:
        return Attention(64, 64, block, "ieee", 4, 3)
    if isinstance(arch, str) and block > 64 and dtype != torch.float32:
        return Attention(32, 32, block, "ieee", 4, 1)
    rows = 32 if block > 64 or bias or (arch == 100 and block == 64) else 64
    return _loop(D, dtype, arch) or Attention(rows, 64, block, "ieee", 8, 1)


@configured()
def attention_bwd_dq(
    D: int, dtype: torch.dtype, arch: Arch, drop: bool, bias: bool = False
) -> Attention:
    """A program holds BLOCK_M queries and loops over keys."""
    block = head_block(D)
    if bias and dtype == torch.float32 and block > 64:
        return Attention(16, 16, block, precision(dtype, arch), 4, 1)
    warps = 8 if block > 64 else 4
    stages = 3 if arch == 90 and block <= 64 else 2
    return _loop(D, dtype, arch) or Attention(64, 32, block, "ieee", warps, stages)


def attention_bwd_dbias(D: int, dtype: torch.dtype, arch: Arch, drop: bool) -> Attention:
    """BLOCK_M distances and queries, BLOCK_N keys, which must be twice as many: tune() leaves both as they are."""
    block, exact = head_block(D), precision(dtype, arch)
    rows = 16 if dtype == torch.float32 or block > 64 else 32
    warps = 8 if dtype == torch.float32 and block > 64 else 4
    return Attention(rows, 2 * rows, block, exact, warps, 1)


def rope(half: int) -> Tiles:
    """BLOCK_M tokens and `half` pairs of one head.

    A thread holds at least 8 pairs, so that no two threads load the same element, and gradients can turn in place.
    tune() leaves these sizes as they are.
    """
    pairs = max(16, triton.next_power_of_2(half))
    return Tiles(max(16, 2048 // pairs), pairs, 4)


@dataclass(frozen=True)
class Gemm:
    """Output tiles of BLOCK_M x BLOCK_N in steps of BLOCK_K; GROUP rows of tiles share the columns of w in L2."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    PRECISION: str
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True


@configured()
def gemm(M: int, N: int, dtype: torch.dtype, arch: Arch) -> Gemm:
    """Large tiles if they are enough to fill the device, small ones for few tokens."""
    exact = precision(dtype, arch)
    # stages: AMD has 64 KB of shared memory
    most = 2 if isinstance(arch, str) else 4
    if dtype == torch.float32:
        return Gemm(64, 64, 32, 8, exact, 4, 3 if arch == 100 else 2)
    if M <= 64:
        # narrow tiles, so that few rows still make many tiles; fastest on an H200
        return Gemm(tile(M, 64), 32, 64, 8, exact, 4, 3 if arch == 100 else most)
    if M * N <= 1024 * 1024:
        return Gemm(64, 128, 64, 8, exact, 4, min(most, 3))
    return Gemm(128, 128, 64, 8, exact, 8, min(most, 3))
