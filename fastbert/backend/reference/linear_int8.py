"""linear_int8: y = x weight^T + bias from integers: an int8 weight, each row of x rounded to 12 or 8 bits.

For a row of x, with L = 2047 (12 bits) or 127 (8 bits), all in fp32:
    m = max_k |x_k|,  r = L / m,  q_k = round(x_k r), ties to even,  a = m / L
    y_n = (sum_k q_k weight[n, k]) a scale_n + bias_n
The sum is an exact integer of 32 bits, so that a row's result depends on nothing but the row. A row with an element
that is not finite gives NaN. A row with m < 2^-100 counts as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision, nbytes

# the largest integer of a row of x, by bits
LEVELS = {12: 2047, 8: 127}
LARGEST_WEIGHT = 127
# rows below it count as zeros: L / m stays finite
_SMALLEST = 2.0**-100


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def quantize_rows(
    x: Tensor,  # (T, K)
    bits: int,
) -> tuple[Tensor, Tensor]:
    """The integers q (T, K) and the factors a (T,), both fp32; x of any dtype is rounded to fp32 first."""
    x = x.detach().to(torch.float32)
    m = x.abs().amax(1)
    # a tensor: PyTorch multiplies by the reciprocal where a number divides
    levels = torch.full_like(m, LEVELS[bits])
    finite, small = m.isfinite(), m < _SMALLEST
    live = (finite & ~small)[:, None]
    r = (levels / m)[:, None]
    q = torch.where(live, torch.round(x * r), 0.0)
    a = torch.where(small, 0.0, m / levels)
    return q, torch.where(finite, a, float("nan"))


def quantize_weight(
    weight: Tensor,  # (N, K)
    name: str = "the weight",
) -> tuple[Tensor, Tensor]:
    """int8 (N, K) in [-127, 127] and the scale of each row, (N,) fp32: max_k |w_k| / 127, 0 for a row of zeros.

    Refuses numbers that are not finite, with the weight's `name`.
    """
    w = weight.detach().to(torch.float32)
    largest = w.abs().amax(1)
    if not bool(largest.isfinite().all()):
        row = int((~largest.isfinite()).nonzero()[0])
        raise ValueError(
            f"row {row} of {name} has a number that is not finite: quantise a weight without inf and NaN"
        )
    scale = largest / torch.full_like(largest, LARGEST_WEIGHT)
    q = torch.where(scale[:, None] > 0, torch.round(w / scale[:, None]), 0.0)
    # the scale of subnormal rows is off by up to one half
    q = q.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    return q.to(torch.int8), scale


def most_columns(bits: int, largest: int = LARGEST_WEIGHT) -> int:
    """The most columns of a weight in [-largest, largest] with which every sum fits into int32."""
    return (2**31 - 1) // (LEVELS[bits] * largest)


def forward(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    bias: Tensor | None,  # (N,)
    bits: int,
) -> Tensor:
    """y (T, N) in x's dtype. To autograd the rounding is the identity, and the scale a constant."""
    q, a = quantize_rows(x, bits)
    wide_x, s, b = widen(x, scale.detach(), bias)
    sums = (q.double() @ weight.t().double()).to(wide_x.dtype)
    y = sums * a[:, None] * s
    if b is not None:
        y = y + b
    if torch.is_grad_enabled() and x.requires_grad:
        through = (wide_x @ weight.t().to(wide_x.dtype)) * s
        y = y + (through - through.detach())
    return y.to(x.dtype)


def backward(
    dy: Tensor,  # (T, N)
    weight: Tensor,  # (N, K) int8
    scale: Tensor,  # (N,)
    needs: Sequence[bool],  # for x, bias
) -> tuple[Tensor, Tensor]:
    """dx = (dy scale) weight in dy's dtype, the rounding taken as the identity; dbias = sum_t dy, fp32."""
    (g,) = widen(dy)
    dx = ((g * scale) @ weight.to(g.dtype)).to(dy.dtype) if needs[0] else dy.new_empty(0)
    return dx, g.sum(0) if needs[1] else dy.new_empty(0)


def eager(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, bits: int = 12
) -> Tensor:
    """The stock product of the rounded numbers, in fp32: what a user would write."""
    wide = x.reshape(-1, x.shape[-1]).float()
    q, a = quantize_rows(wide, bits)
    rounded = wide + (q * a[:, None] - wide).detach()
    w = weight.float() * scale.detach().float()[:, None]
    y = torch.nn.functional.linear(rounded, w, None if bias is None else bias.float())
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _worst(dtype: torch.dtype, K: int) -> dict[str, Tensor]:
    """The largest sums of both signs: every integer is the largest one, or its negative."""
    signs = torch.tensor([[1.0], [-1.0]])
    weight = (127 * signs.expand(2, K)).to(torch.int8)
    return {"x": signs.expand(2, K).to(dtype), "weight": weight, "scale": torch.full((2,), 2.0**-8)}


def _rows(draw: Draw) -> Tensor:
    """Rows of zeros, of one outlier, of numbers below 2^-100 and just above, of ties, of large numbers."""
    x = draw.normal(6, 13, dtype=torch.float32)
    x[0] = 0.0
    x[1, 5] = 1000.0
    x[2] *= 2.0**-105
    x[3] *= 2.0**-99
    x[4] = torch.arange(13) / 2
    x[4, 0] = 2047.0
    x[5] *= 4000.0
    return x.to(draw.device, draw.dtype)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.linear_int8`."""
    draw = Draw(dtype, device, seed)

    def call(
        T: int, K: int, N: int, bias: bool = True, biases: torch.dtype | None = None
    ) -> dict[str, Any]:
        weight, scale = quantize_weight(draw.normal(N, K, scale=K**-0.5, dtype=torch.float32))
        return {
            "x": draw.normal(T, K),
            "weight": weight,
            "scale": scale,
            "bias": draw.normal(N, dtype=biases) if bias else None,
        }

    yield Sample("T1-K1-N1", call(1, 1, 1), "one element")
    yield Sample("T7-K13-N5", call(7, 13, 5), "primes, an odd K")
    yield Sample("T7-K13-N5-8bit", call(7, 13, 5) | {"bits": 8}, "8 bits")
    yield Sample("T1-K769-N33", call(1, 769, 33), "one token, an odd K beyond a block")
    yield Sample("T33-K768-N768", call(33, 768, 768), "attention output of BERT-base")
    yield Sample("nobias", call(9, 8, 2, bias=False), "bias=None")
    yield Sample("T0", call(0, 8, 4), "empty")
    leading = call(6, 16, 3)
    yield Sample("leading", leading | {"x": leading["x"].view(2, 3, 16)}, "leading dimensions")
    strided = call(6, 16, 3)
    yield Sample("strided", strided | {"x": strided["x"].t().contiguous().t()}, "non-contiguous")
    rows, zeros = call(6, 13, 3), torch.zeros(3, 1, dtype=torch.bool, device=draw.device)
    zeros[1] = True
    rows["weight"] = rows["weight"].masked_fill(zeros, 0)
    rows["scale"] = rows["scale"].masked_fill(zeros[:, 0], 0.0)
    yield Sample("rows", rows | {"x": _rows(draw)}, "zeros, an outlier, tiny and large rows")
    bad = call(4, 13, 3)
    bad["x"][0, 3], bad["x"][1, 12], bad["x"][3, 0] = float("nan"), float("inf"), -float("inf")
    yield Sample("nonfinite", bad, "rows of NaN")
    for bits in (12, 8):
        worst = {k: t.to(draw.device) for k, t in _worst(dtype, 3072).items()}
        yield Sample(f"worst-{bits}bit", worst | {"bits": bits}, "the largest sums")
    if low_precision(dtype):
        yield Sample("mixed", call(9, 64, 32, biases=torch.float32), "an fp32 bias")


def cost(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, bits: int = 12
) -> Cost:
    """One GEMM forward and one backward; a multiply-add of integers counts as two operations."""
    rows = x.numel() // max(x.shape[-1], 1)
    flops = 2 * rows * weight.numel()
    out = rows * weight.shape[0] * x.element_size()
    moved = nbytes(x, weight, scale, bias) + out
    return Cost(moved, flops, moved, flops)
