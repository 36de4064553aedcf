"""dropout_add_layer_norm on the native CPU kernel, csrc/cpu/dropout_add_layer_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.cpu import DTYPES, native, unavailable
from fastbert.reference.philox import threshold


def unsupported(
    x: Tensor,  # (N, C)
    residual: Tensor,  # (N, C)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    rows: Tensor | None,  # (N,) int64
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    if unavailable is not None:
        return unavailable
    if x.dtype not in DTYPES:
        return f"x is {x.dtype} and the cpu kernel computes float32 and bfloat16: cast x, or use the torch backend"
    if p == 0.0:
        # measured at 415 and 1024 rows of 768, fp32 and bf16: .8 to 1.07 x stock forward, .5 to .85 x backward,
        # against 2.2 to 3.4 x with dropout (2026-11-24, 2 threads of an AMD EPYC, testing.timing.interleave)
        return "p is 0: without dropout the stock layer_norm is faster than this kernel, use the torch backend"
    if p > 1 - 2**-32:
        return f"p is {p}: the cpu kernel compares 32-bit words, pass p <= 1 - 2**-32"
    return None


def forward(
    x: Tensor,  # (N, C)
    residual: Tensor,  # (N, C)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    rows: Tensor | None,  # (N,) int64
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (N, C) and z (N, C) in x's dtype, mean and rstd (N,) fp32; z is (0, C) unless `save`."""
    count, width = x.shape
    y = torch.empty_like(x)
    z = x.new_empty(count if save else 0, width)
    mean, rstd = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        weight, bias, rows = _fp32(weight), _fp32(bias), _int64(rows)
        getattr(native, f"dropout_add_layer_norm_fwd_{DTYPES[x.dtype]}")(
            x=x.data_ptr(),
            residual=residual.data_ptr(),
            weight=weight.data_ptr(),
            bias=bias.data_ptr(),
            y=y.data_ptr(),
            z=z.data_ptr() if save else 0,
            mean=mean.data_ptr(),
            rstd=rstd.data_ptr(),
            N=count,
            C=width,
            eps=eps,
            threads=torch.get_num_threads(),
            **_dropout(p, seed, site, rows),
        )
    return y, z, mean, rstd


def backward(
    dy: Tensor,  # (N, C)
    z: Tensor,  # (N, C)
    weight: Tensor,  # (C,)
    mean: Tensor,  # (N,) fp32
    rstd: Tensor,  # (N,) fp32
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    rows: Tensor | None,  # (N,) int64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dresidual (N, C) in z's dtype, dweight and dbias (C,) in weight's dtype."""
    count, width = z.shape
    dx, dresidual = torch.empty_like(z), torch.empty_like(z)
    dweight, dbias = (z.new_zeros(width, dtype=torch.float32) for _ in range(2))
    if z.numel() > 0:
        weight32, rows = _fp32(weight), _int64(rows)
        getattr(native, f"dropout_add_layer_norm_bwd_{DTYPES[z.dtype]}")(
            dy=dy.data_ptr(),
            z=z.data_ptr(),
            weight=weight32.data_ptr(),
            mean=mean.data_ptr(),
            rstd=rstd.data_ptr(),
            dx=dx.data_ptr(),
            dresidual=dresidual.data_ptr(),
            dweight=dweight.data_ptr(),
            dbias=dbias.data_ptr(),
            N=count,
            C=width,
            threads=torch.get_num_threads(),
            **_dropout(p, seed, site, rows),
        )
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _fp32(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()


def _int64(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int64).contiguous()


def _dropout(p: float, seed: Tensor | None, site: int, rows: Tensor | None) -> dict[str, float]:
    """The native functions' arguments for dropout: addresses, 0 for none."""
    return {
        "seed": seed.data_ptr() if p > 0 and seed is not None else 0,
        "site": site,
        "threshold": threshold(p),
        "scale": 1.0 / (1.0 - p),
        "rows": rows.data_ptr() if rows is not None else 0,
    }
