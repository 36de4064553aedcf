"""cross_entropy in Triton: a program reads a row of up to LARGEST logits once, a longer one again for its gradient.

backward computes the softmax again: exp(z - lse) would have the rounding error of lse, which is large for large logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _launch, dense, unsupported_dtype
from fastbert.kernels._configured import configured

LARGEST = 16384


@dataclass(frozen=True)
class _Config:
    """Blocks of BLOCK_V logits; with ONE a block holds the whole row."""

    BLOCK_V: int
    ONE: bool
    num_warps: int
    enable_fp_fusion: bool = True


@configured()
def _cross_entropy_block(V: int, arch: _launch.Arch) -> _Config:
    """A block for a row of up to LARGEST logits, at most 32 a thread; longer rows take several."""
    if V > LARGEST:
        # 8 logits a thread, 16 bytes of bf16
        return _Config(2048, False, 4 if isinstance(arch, str) else 8)
    block = max(64, triton.next_power_of_2(V))
    return _Config(block, True, min(16, max(1, block // 1024)))


@triton.jit
def _load(row_ptr, bias_ptr, at, V, width):
    """Logits plus bias in fp32 at columns `at`, -inf from V on; a row has `width` columns in memory."""
    z = tl.load(row_ptr + at, mask=at < width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + at, mask=at < V, other=0.0).to(tl.float32)
    return tl.where(at < V, z, -float("inf"))


@triton.jit
def _largest_and_sum(row_ptr, bias_ptr, V, width, BLOCK_V: tl.constexpr):
    """max and sum exp(z - max) of a row of V logits, online."""
    cols = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        z = _load(row_ptr, bias_ptr, start + cols, V, width)
        above = tl.maximum(largest, z)
        # where all logits so far are padding the maximum is -inf, and -inf - -inf would be NaN
        shift = tl.where(above == -float("inf"), 0.0, above)
        total = total * tl.exp(largest - shift) + tl.exp(z - shift)
        largest = above
    top = tl.max(largest, 0)
    return top, tl.sum(total * tl.exp(largest - top), 0)


@triton.jit
def _store_gradient(
    row_ptr,
    bias_ptr,
    gradient_ptr,
    label,
    top,
    total,
    factor,
    V,
    width,
    BLOCK_V: tl.constexpr,
):
    """Store (softmax - onehot(label)) factor of a row longer than BLOCK_V; gradient_ptr may be row_ptr."""
    for start in range(0, V, BLOCK_V):
        at = start + tl.arange(0, BLOCK_V)
        z = _load(row_ptr, bias_ptr, at, V, width)
        p = tl.exp(z - top) * (1.0 / total) - tl.where(at == label, 1.0, 0.0)
        tl.store(gradient_ptr + at, p * factor, mask=at < width)


@triton.jit
def _zero_row(row_ptr, width, BLOCK_V: tl.constexpr):
    for start in range(0, width, BLOCK_V):
        at = start + tl.arange(0, BLOCK_V)
        tl.store(row_ptr + at, tl.zeros((BLOCK_V,), tl.float32), mask=at < width)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,  # (N, width), V of them used
    bias_ptr,  # (V,), or None
    labels_ptr,  # (N,)
    loss_ptr,  # (N,)
    lse_ptr,  # (N,)
    gradient_ptr,  # (N, width): softmax - onehot; may be logits_ptr, or None
    V,
    units,
    ignore_index,
    UNIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE: tl.constexpr,
):
    # loss = log sum exp(z - max) + max - z[label],  gradient = softmax(z) - onehot(label)
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row).to(tl.int64)
    # the compiler sees that rows begin at multiples of UNIT elements: accesses can be that wide
    width = units * UNIT
    logits_ptr += row.to(tl.int64) * width
    cols = tl.arange(0, BLOCK_V)
    if gradient_ptr is not None:
        gradient_ptr += row.to(tl.int64) * width
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if gradient_ptr is not None:
            _zero_row(gradient_ptr, width, BLOCK_V)
        return
    # memory-safe: a label out of range gives NaN
    valid = (label >= 0) & (label < V)
    at_label = _load(logits_ptr, bias_ptr, tl.where(valid, label, 0), V, width)
    factor = tl.where(valid, 1.0, float("nan"))
    if ONE:
        z = _load(logits_ptr, bias_ptr, cols, V, width)
        top = tl.max(z, 0)
        powers = tl.exp(z - top)
        total = tl.sum(powers, 0)
        if gradient_ptr is not None:
            p = powers * (1.0 / total) - tl.where(cols == label, 1.0, 0.0)
            tl.store(gradient_ptr + cols, p * factor, mask=cols < width)
    else:
        top, total = _largest_and_sum(logits_ptr, bias_ptr, V, width, BLOCK_V)
        if gradient_ptr is not None:
            _store_gradient(
                logits_ptr, bias_ptr, gradient_ptr, label, top, total, factor, V, width, BLOCK_V
            )
    tl.store(loss_ptr + row, tl.log(total) + (top - at_label) * factor)
    tl.store(lse_ptr + row, top + tl.log(total))


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr,  # (N,)
    logits_ptr,  # (N, V)
    labels_ptr,  # (N,)
    dlogits_ptr,  # (N, V)
    units,
    ignore_index,
    UNIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE: tl.constexpr,
):
    # dlogits = (softmax(z) - onehot(label)) dloss, 0 in ignored rows
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row).to(tl.int64)
    width = units * UNIT
    V = width
    logits_ptr += row.to(tl.int64) * width
    dlogits_ptr += row.to(tl.int64) * width
    cols = tl.arange(0, BLOCK_V)
    if label == ignore_index:
        _zero_row(dlogits_ptr, width, BLOCK_V)
        return
    scale = tl.load(dloss_ptr + row)
    scale = tl.where((label >= 0) & (label < V), scale, float("nan"))
    if ONE:
        z = _load(logits_ptr, None, cols, V, width)
        powers = tl.exp(z - tl.max(z, 0))
        p = powers * (1.0 / tl.sum(powers, 0)) - tl.where(cols == label, 1.0, 0.0)
        tl.store(dlogits_ptr + cols, p * scale, mask=cols < width)
    else:
        top, total = _largest_and_sum(logits_ptr, None, V, width, BLOCK_V)
        _store_gradient(logits_ptr, None, dlogits_ptr, label, top, total, scale, V, width, BLOCK_V)


def unsupported(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(logits=logits)


def forward(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, 0 in ignored ones, and lse, (N,) fp32."""
    return row_losses(logits, logits.shape[1], None, labels, ignore_index, None)


def row_losses(
    logits: Tensor,  # (N, width), of which the first V columns count
    V: int,
    bias: Tensor | None,  # (V,), added to every row
    labels: Tensor,  # (N,)
    ignore_index: int,
    gradient: Tensor | None,  # like logits, or logits itself
) -> tuple[Tensor, Tensor]:
    """The loss of each row and lse, (N,) fp32; `gradient` receives softmax - onehot, 0 in ignored rows."""
    N, width = logits.shape
    loss, lse = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
    if N > 0:
        unit = math.gcd(width, 16)
        _cross_entropy_fwd_kernel[(N,)](
            logits,
            dense(bias),
            dense(labels),
            loss,
            lse,
            gradient,
            V,
            width // unit,
            ignore_index,
            UNIT=unit,
            **vars(_cross_entropy_block(V, _launch.arch(logits.device))),
        )
    return loss, lse


def backward(
    dloss: Tensor,  # (N,)
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    ignore_index: int,
) -> Tensor:
    """dlogits (N, V) in logits' dtype, 0 in ignored rows."""
    N, V = logits.shape
    dlogits = torch.empty_like(logits)
    if N > 0:
        unit = math.gcd(V, 16)
        _cross_entropy_bwd_kernel[(N,)](
            dloss,
            logits,
            dense(labels),
            dlogits,
            V // unit,
            ignore_index,
            UNIT=unit,
            **vars(_cross_entropy_block(V, _launch.arch(logits.device))),
        )
    return dlogits
