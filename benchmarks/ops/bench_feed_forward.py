"""feed_forward: two GEMMs around an exact GELU, F = 4C, against the three stock calls."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import BF16_GEMM, DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "feed_forward"
GRID = grid(SLUG) + grid(SLUG, *BF16_GEMM, "bf16")


def stock(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The stock calls that a user writes."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def build(spec: Spec) -> Case:
    """F = 4C."""
    draw = Draw(DTYPES[spec.dtype])
    C, wide = spec.C, 4 * spec.C
    args = {
        "x": draw.normal(spec.T, C),
        "w1": draw.normal(wide, C, scale=C**-0.5),
        "b1": draw.normal(wide),
        "w2": draw.normal(C, wide, scale=wide**-0.5),
        "b2": draw.normal(C),
    }
    return Case(args, stock, args)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_feed_forward(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
