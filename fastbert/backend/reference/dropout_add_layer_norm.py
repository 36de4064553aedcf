"""dropout_add_layer_norm: z = residual + dropout(x), y = LayerNorm(z): post-norm layers (Devlin et al. 2018) use y.

Pre-norm layers (Xiong et al. 2020) use both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backend.reference import layer_norm, philox
from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision, nbytes


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def forward(
    x: Tensor,  # (N, C)
    residual: Tensor,  # (N, C)
    weight: Tensor,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    rows: Tensor | None,  # (N,) absolute row numbers
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (N, C) in x's dtype; z = residual + dropout(x) likewise, empty without `save`; mean and rstd (N,) fp32."""
    wide_x, wide_residual, w, b = widen(x, residual, weight, bias)
    z = wide_residual + philox.dropout(wide_x, p, seed, site, rows)
    y, mean, rstd = layer_norm.forward(z, w, b, eps)
    return y.to(x.dtype), z.to(x.dtype) if save else x.new_empty(0, x.shape[1]), mean, rstd


def backward(
    dy: Tensor,  # (N, C)
    z: Tensor,  # (N, C), or y where bias is given
    weight: Tensor,  # (C,)
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    p: float,
    seed: Tensor | None,
    site: int,
    rows: Tensor | None,
    bias: Tensor | None = None,  # (C,)
    dz: Tensor | None = None,  # (N, C): the gradient that reaches z itself
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dresidual (N, C), dweight and dbias (C,).

    With dsum the gradient that layer_norm's backward gives, plus dz:  dresidual = dsum,  dx = dropout(dsum)
    """
    wide_dy, wide_z, wide_dz = widen(dy, z, dz)
    wide_z = layer_norm.rebuilt(wide_z, weight, bias, mean, rstd)
    dsum, dweight, dbias = layer_norm.backward(wide_dy, wide_z, weight, mean, rstd)
    if wide_dz is not None:
        dsum = dsum + wide_dz
    dx = philox.dropout(dsum, p, seed, site, rows).to(z.dtype)
    dx = dx.clone() if p == 0.0 and dsum.dtype == z.dtype else dx
    return dx, dsum.to(z.dtype), dweight, dbias


def eager(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    rows: Tensor | None = None,
    from_output: bool = False,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stock ops in the tested dtype, dropout as a given mask."""
    z = residual + philox.dropout(x, p, seed, site, rows)
    y = layer_norm.eager(z, weight, bias, eps)
    return (y, z) if return_sum else y


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.dropout_add_layer_norm`."""
    draw = Draw(dtype, device, seed)

    def call(N: int, C: int, p: float, weights: torch.dtype | None = None) -> dict[str, object]:
        kwargs = {
            "x": draw.normal(N, C),
            "residual": draw.normal(N, C),
            "weight": draw.normal(C, mean=1.0, scale=0.2, dtype=weights),
            "bias": draw.normal(C, dtype=weights),
        }
        return kwargs | ({"p": p, "seed": draw.seed(), "site": 3} if p else {})

    yield Sample("T1-C3", call(1, 3, 0.0), "one short row")
    yield Sample("T7-C13-drop", call(7, 13, 0.1), "primes: the last Philox quad is cut")
    yield Sample("T63-C768-drop", call(63, 768, 0.1), "BERT-base rows, odd count")
    yield Sample("T63-C384", call(63, 384, 0.0), "inference")
    yield Sample("T0-C8", call(0, 8, 0.1), "empty")
    rows = torch.tensor([2, 3, 5, 70_000, 2**31 + 1], device=draw.device)
    yield Sample("rows", call(5, 12, 0.5) | {"rows": rows}, "compacted rows, numbers past int32")
    if low_precision(dtype):
        yield Sample("mixed", call(8, 64, 0.1, torch.float32), "fp32 weights")
    kept = call(37, 96, 0.1) | {"bias": draw.normal(96, scale=0.1), "from_output": True}
    yield Sample("T37-output", kept, "xhat rebuilt from the output, with BERT's kind of biases")
    pre_norm = {k: v for k, v in call(9, 24, 0.1).items() if k != "bias"}
    yield Sample("nobias", pre_norm, "a layer without biases")
    yield Sample("sum", call(7, 13, 0.1) | {"return_sum": True}, "z too, as in pre-norm layers")
    yield Sample("sum-nobias", pre_norm | {"return_sum": True}, "z too, without a bias")


def cost(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object
) -> Cost:
    """Forward reads x and residual, writes y and z; backward reads dy and z, writes dx and dresidual."""
    rows, affine = 8 * x.shape[0], nbytes(weight, bias)
    return Cost(
        4 * nbytes(x) + rows + affine,
        10 * x.numel(),
        4 * nbytes(x) + rows + 2 * affine,
        16 * x.numel(),
    )
