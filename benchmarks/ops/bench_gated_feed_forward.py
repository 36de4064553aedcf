"""gated_feed_forward without biases, GEGLU at F = 1.5C (ModernBERT) and SwiGLU at F = 2.5C, against stock calls."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import BF16_GEMM, DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "gated_feed_forward"
GRID = grid(SLUG) + grid(SLUG, (512,), variant="silu") + grid(SLUG, *BF16_GEMM, "bf16")


def geglu(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The stock calls of ModernBERT."""
    a, g = F.linear(x, w1).chunk(2, -1)
    return F.linear(F.gelu(a) * g, w2)


def swiglu(x: Tensor, wa: Tensor, wg: Tensor, w2: Tensor) -> Tensor:
    """The stock calls of EuroBERT and NomicBERT."""
    return F.linear(F.silu(F.linear(x, wa)) * F.linear(x, wg), w2)


def build(spec: Spec) -> Case:
    """One weight of both halves with GELU, two weights with SiLU."""
    draw = Draw(DTYPES[spec.dtype])
    C, silu = spec.C, spec.variant == "silu"
    wide = C * 5 // 2 if silu else C * 3 // 2
    pieces = 2 if silu else 1
    x = draw.normal(spec.T, C)
    w1 = [draw.normal(2 * wide // pieces, C, scale=C**-0.5) for _ in range(pieces)]
    w2 = draw.normal(C, wide, scale=wide**-0.5)
    activation = spec.variant or "gelu"
    ours = {"x": x, "w1": w1, "b1": None, "w2": w2, "b2": None, "activation": activation}
    if silu:
        return Case(ours, swiglu, {"x": x, "wa": w1[0], "wg": w1[1], "w2": w2})
    return Case(ours, geglu, {"x": x, "w1": w1[0], "w2": w2})


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_gated_feed_forward(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
