"""gated_feed_forward in Triton: the library's GEMMs around one pass forward, and one backward for both halves.

Up to FEW tokens the first GEMM is ours, for one weight or two: a launch costs more than the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.backend.stock import linear as library
from fastbert.kernels import _gemm, _launch, linear, unsupported_dtype
from fastbert.kernels._configured import configured
from fastbert.kernels._math import activation_and_derivative
from fastbert.kernels.linear import FEW


@triton.jit(do_not_specialize=["N"])
def _gated_feed_forward_fwd_kernel(
    u_ptr,  # (N, 2F): a, then g
    h_ptr,  # (N, F)
    N,
    F,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # h = act(a) g
    short: tl.constexpr = u_ptr.dtype.element_ty.primitive_bitwidth == 16
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < N) & (cols < F)
    at = u_ptr + rows * (2 * F) + cols
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    value, _ = activation_and_derivative(a, ACTIVATION, short)
    tl.store(h_ptr + rows * F + cols, value * g, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _gated_feed_forward_bwd_kernel(
    dh_ptr,  # (N, F)
    u_ptr,  # (N, 2F): a, then g
    du_ptr,  # (N, 2F)
    h_ptr,  # (N, F), or None
    N,
    F,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # da = dh g act'(a),  dg = dh act(a)  and, if h_ptr is given, h = act(a) g
    short: tl.constexpr = u_ptr.dtype.element_ty.primitive_bitwidth == 16
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < N) & (cols < F)
    both, one = rows * (2 * F) + cols, rows * F + cols
    a = tl.load(u_ptr + both, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(u_ptr + both + F, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + one, mask=inside, other=0.0).to(tl.float32)
    value, derivative = activation_and_derivative(a, ACTIVATION, short)
    tl.store(du_ptr + both, dh * g * derivative, mask=inside)
    tl.store(du_ptr + both + F, dh * value, mask=inside)
    if h_ptr is not None:
        tl.store(h_ptr + one, value * g, mask=inside)


@configured()
def _gated_feed_forward_tiles(width: int, arch: _launch.Arch) -> _launch.Tiles:
    """2048 elements of each half to a program, 8 a thread on AMD: 16 bytes of a 16-bit half."""
    block = min(1024, max(16, triton.next_power_of_2(width)))
    return _launch.Tiles(2048 // block, block, 4)


def unsupported(
    x: Tensor,  # (T, C)
    w1: Sequence[Tensor],  # [(2F, C)] or 2 of (F, C)
    b1: Sequence[Tensor],  # likewise, or empty
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    activation: str,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype(x=x, w1=w1[0], w2=w2)


def _over(kernel: triton.JITFunction, u: Tensor, activation: str, *args: Tensor | None) -> None:
    """Launch one of the two kernels over the elements of a half of u (T, 2F)."""
    if u.numel() == 0:
        return
    T, F = u.shape[0], u.shape[1] // 2
    config = _gated_feed_forward_tiles(F, _launch.arch(u.device))
    grid = triton.cdiv(T, config.BLOCK_M), triton.cdiv(F, config.BLOCK_N)
    kernel[grid](*args, T, F, ACTIVATION=activation, **vars(config))


def forward(
    x: Tensor,  # (T, C)
    w1: Sequence[Tensor],  # [(2F, C)] or 2 of (F, C): the activated half, then the other
    b1: Sequence[Tensor],  # likewise, or empty
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (T, C) and the pre-activations u = [a, g] (T, 2F) in x's dtype, u empty without `save`."""
    T, F = x.shape[0], w2.shape[1]
    if T <= FEW:
        u, _ = _gemm.project(x, w1, b1)
    else:
        u = library.forward(x, library.joined(w1), library.joined(b1) if b1 else None)
    h = x.new_empty(T, F)
    _over(_gated_feed_forward_fwd_kernel, u, activation, u, h)
    return library.forward(h, w2, b2), u if save else x.new_empty(0, 2 * F)


def backward(
    dy: Tensor,  # (T, C)
    x: Tensor,  # (T, C)
    u: Tensor,  # (T, 2F)
    w1: Sequence[Tensor],
    w2: Tensor,
    activation: str,
    needs: Sequence[bool],  # for x, w1, b1, w2, b2
    dtype: torch.dtype,  # of dw1 and dw2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1 (2F, C), db1 (2F,), dw2, db2, empty where not needed; act(a) * g is built again from u."""
    T, F = u.shape[0], w2.shape[1]
    dx = dw1 = db1 = dw2 = x.new_empty(0)
    h = x.new_empty(T, F) if needs[3] else None
    dh, _, db2 = linear.backward(dy, u, w2, [any(needs[:3]), False, needs[4]], dtype)
    if any(needs[:3]):
        du = torch.empty_like(u)
        _over(_gated_feed_forward_bwd_kernel, u, activation, dh, u, du, h)
        dx, dw1, db1 = linear.backward(du, x, library.joined(w1), needs[:3], dtype)
    elif h is not None:
        _over(_gated_feed_forward_fwd_kernel, u, activation, u, h)
    if h is not None:
        _, dw2, _ = linear.backward(dy, h, w2, [False, True, False], dtype)
    return dx, dw1, db1, dw2, db2
