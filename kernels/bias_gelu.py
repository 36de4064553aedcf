"""bias_gelu in Triton: exact erf or tanh; backward gives dx and dbias in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.backend._common import unsupported_gelu
from fastbert.kernels import _launch, dense, unsupported_dtype
from fastbert.kernels._configured import configured
from fastbert.kernels._math import gelu_and_derivative
from fastbert.kernels._reduce import sum_partials


@triton.jit(do_not_specialize=["N"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # (N, F)
    bias_ptr,  # (F,), or None
    y_ptr,  # (N, F)
    N,
    F,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < N)[:, None] & (cols < F)[None, :]
    at = rows.to(tl.int64)[:, None] * F + cols[None, :]
    u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    short: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    y, _ = gelu_and_derivative(u, TANH, short)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _bias_gelu_bwd_kernel(
    dy_ptr,  # (N, F)
    x_ptr,  # (N, F)
    bias_ptr,  # (F,), or None
    dx_ptr,  # (N, F)
    y_ptr,  # (N, F), or None
    partial_ptr,  # (1, programs, F) fp32, or None
    N,
    F,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # dx = dy gelu'(x + bias), its sum over this program's rows and, if y_ptr is given, gelu(x + bias)
    short: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ahead: tl.constexpr = 2 if short else 1
    for first in tl.range(program * BLOCK_M, N, programs * BLOCK_M, num_stages=ahead):
        rows = first + tl.arange(0, BLOCK_M)
        inside = (rows < N)[:, None] & (cols < F)[None, :]
        at = rows.to(tl.int64)[:, None] * F + cols[None, :]
        u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            u += tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
        y, derivative = gelu_and_derivative(u, TANH, short)
        dx = dy * derivative
        tl.store(dx_ptr + at, dx, mask=inside)
        if y_ptr is not None:
            tl.store(y_ptr + at, y, mask=inside)
        total += dx
    if partial_ptr is not None:
        tl.store(partial_ptr + program * F + cols, tl.sum(total, 0), mask=cols < F)


@configured()
def _bias_gelu_tiles(width: int, arch: _launch.Arch) -> _launch.Tiles:
    """2048 elements a program, 16 a thread on NVIDIA: 2 rows of 1024 columns, or more rows of fewer columns."""
    block = min(1024, max(16, triton.next_power_of_2(width)))
    return _launch.Tiles(2048 // block, block, 4)


def _grid(N: int, F: int, config: _launch.Tiles, most: int) -> tuple[int, int]:
    """Programs over (rows, columns), at most `most` of them along the rows."""
    return min(triton.cdiv(N, config.BLOCK_M), most), triton.cdiv(F, config.BLOCK_N)


def unsupported(
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_gelu(approximate) or unsupported_dtype(x=x, bias=bias)


def forward(
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> Tensor:
    """y (N, F) in x's dtype."""
    N, F = x.shape
    y = torch.empty_like(x)
    if x.numel() > 0:
        config = _bias_gelu_tiles(F, _launch.arch(x.device))
        _bias_gelu_fwd_kernel[_grid(N, F, config, N)](
            x, dense(bias), y, N, F, TANH=approximate == "tanh", **vars(config)
        )
    return y


def backward(
    dy: Tensor,  # (N, F)
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
) -> tuple[Tensor, Tensor]:
    """dx (N, F) in x's dtype and dbias (F,) in bias's, empty without bias."""
    dx, _, dbias = gradients(dy, x, bias, approximate, None if bias is None else bias.dtype)
    return dx, dbias


def gradients(
    dy: Tensor,  # (N, F)
    x: Tensor,  # (N, F)
    bias: Tensor | None,  # (F,)
    approximate: str,
    sums: torch.dtype | None,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, F), gelu(x + bias) (N, F) and dx's sum over the rows (F,) in dtype `sums`.

    The second is empty without `again`, the third without `sums`.
    """
    N, F = x.shape
    dx, empty = torch.empty_like(x), x.new_empty(0)
    y = torch.empty_like(x) if again else empty
    if x.numel() == 0:
        return dx, y, empty if sums is None else x.new_zeros(F, dtype=sums)
    config = _bias_gelu_tiles(F, _launch.arch(x.device))
    columns = triton.cdiv(F, config.BLOCK_N)
    most = max(1, 4 * _launch.multiprocessors(x.device) // columns)
    grid = _grid(N, F, config, most)
    partial = None if sums is None else x.new_empty(1, grid[0], F, dtype=torch.float32)
    _bias_gelu_bwd_kernel[grid](
        dy,
        x,
        dense(bias),
        dx,
        y if again else None,
        partial,
        N,
        F,
        TANH=approximate == "tanh",
        **vars(config),
    )
    if partial is None or sums is None:
        return dx, y, empty
    return dx, y, *sum_partials(partial, sums)
