"""The gradient of attention's biases: each the sum of dS over the pairs of query and key at one distance.

A program owns a range of distances of one head and computes dS again for the tiles that hold such pairs, query block
after query block and sequence after sequence. The order is fixed, so no atomics are needed. Where one program a range
would leave the device idle, several share the sequences, and their sums are added up afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _launch, _tiles
from fastbert.kernels._attend import VARYING, head_bias, load_tile, span, weights_and_ds
from fastbert.kernels._math import LOG2E
from fastbert.kernels._reduce import sum_partials

# programs per multiprocessor
_PROGRAMS = 16


@triton.jit(do_not_specialize=[*VARYING, "PARTS", "RANGES"])
def _attention_bwd_dbias_kernel(
    dout_ptr,  # (T, H, D)
    qkv_ptr,  # (T, H + 2 KV, D)
    lse_ptr,  # (H, T)
    delta_ptr,  # (H, T)
    cu_ptr,  # (B + 1,)
    partial_ptr,  # (PARTS, H, 2 P - 1)
    seed_ptr,  # (1,), or None
    bias_ptr,  # (H, 2 P - 1)
    T,
    B,
    P,
    PARTS,
    RANGES,
    scale,
    site,
    threshold,
    keep_scale,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # BLOCK_M distances from `first` on, a multiple of BLOCK_M, in every PARTS-th sequence; BLOCK_N, twice
    # BLOCK_M, keys hold all keys of BLOCK_M queries at these distances
    part, h = tl.program_id(0) // RANGES // H, tl.program_id(0) // RANGES % H
    first = (tl.program_id(0) % RANGES - tl.cdiv(P - 1, BLOCK_M)) * BLOCK_M
    STRIDE: tl.constexpr = (H + 2 * KV) * D
    # key column + row of a tile (query, key) has distance first + column
    column = tl.arange(0, BLOCK_M)
    diagonal = column[:, None] + column[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    most = B
    if RIGHT >= 0:
        most = tl.where(first > RIGHT, 0, most)
    if LEFT >= 0:
        most = tl.where(first + BLOCK_M <= -LEFT, 0, most)
    for b in range(part, most, PARTS):
        start, length = span(cu_ptr, b, B, T)
        row = start.to(tl.int64)
        at = h.to(tl.int64) * T + row
        q_ptr = qkv_ptr + row * STRIDE + h * D
        k_ptr = qkv_ptr + row * STRIDE + (H + h // (H // KV)) * D
        drop = None
        if seed_ptr is not None:
            drop = (tl.load(seed_ptr), b * H + h, site, threshold)
        begin = tl.maximum(1 - BLOCK_M - first, 0) // BLOCK_M * BLOCK_M
        for i0 in range(begin, tl.minimum(length, length - first), BLOCK_M):
            i = i0 + column
            j = i0 + first + tl.arange(0, BLOCK_N)
            # keys before the sequence are zeros, as those behind it
            j = tl.where(j < 0, length, j)
            q = load_tile(q_ptr, i, STRIDE, length, D, BLOCK_D)
            do = load_tile(dout_ptr + row * (H * D) + h * D, i, H * D, length, D, BLOCK_D)
            k = load_tile(k_ptr, j, STRIDE, length, D, BLOCK_D)
            v = load_tile(k_ptr + KV * D, j, STRIDE, length, D, BLOCK_D)
            _, ds = weights_and_ds(
                q,
                do,
                k,
                v,
                tl.load(lse_ptr + at + i, mask=i < length, other=0.0) * LOG2E,
                tl.load(delta_ptr + at + i, mask=i < length, other=0.0),
                i,
                i0 + first,
                length,
                scale * LOG2E,
                drop,
                keep_scale,
                head_bias(bias_ptr, h, P),
                True,
                LEFT,
                RIGHT,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
            )
            key = i[:, None] + (first + column)[None, :]
            there = (i < length)[:, None] & (key >= 0) & (key < length)
            sums += tl.where(there, tl.gather(ds.to(tl.float32), diagonal, 1), 0.0)
    place = first + P - 1 + column
    partial_ptr += (part * H + h) * (2 * P - 1)
    tl.store(partial_ptr + place, tl.sum(sums, 0), mask=(place >= 0) & (place < 2 * P - 1))


def bias_gradient(
    dout: Tensor,  # (T, H, D)
    qkv: Tensor,  # (T, H + 2 kv_heads, D), its queries and keys turned
    lse: Tensor,  # (H, T)
    delta: Tensor,  # (H, T)
    cu_seqlens: Tensor,
    seed: Tensor | None,
    bias: Tensor,  # (H, 2 P - 1)
    rest: tuple[Any, ...],  # scale, site, threshold, keep_scale
    constants: dict[str, int],
    kind: tuple[Any, ...],  # D, dtype, architecture, whether there is dropout
) -> Tensor:
    """The gradient of the biases, (H, 2 P - 1)."""
    H, width = bias.shape
    config = _tiles.attention_bwd_dbias(*kind)
    T, B, P = qkv.shape[0], cu_seqlens.shape[0] - 1, width // 2 + 1
    ranges = triton.cdiv(P - 1, config.BLOCK_M) + triton.cdiv(P, config.BLOCK_M)
    most = triton.cdiv(_PROGRAMS * _launch.multiprocessors(qkv.device), ranges * H)
    parts = max(1, min(B, most))
    partial = bias.new_empty(1, parts, H * width)
    inputs = (dout, qkv, lse, delta, cu_seqlens, partial, seed, bias)
    _attention_bwd_dbias_kernel[(ranges * H * parts,)](
        *inputs, T, B, P, parts, ranges, *rest, **constants, **vars(config)
    )
    if parts == 1:
        return partial.view(H, width)
    return sum_partials(partial, torch.float32)[0].view(H, width)
