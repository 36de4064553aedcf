"""linear: x w^T + b, against F.linear."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import BF16_GEMM, DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "linear"
GRID = grid(SLUG) + grid(SLUG, *BF16_GEMM, "bf16")


def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The stock calls that a user writes."""
    return F.linear(x, weight, bias)


def build(spec: Spec) -> Case:
    """The attention's output projection, C to C."""
    draw = Draw(DTYPES[spec.dtype])
    args = {
        "x": draw.normal(spec.T, spec.C),
        "weight": draw.normal(spec.C, spec.C, scale=spec.C**-0.5),
        "bias": draw.normal(spec.C),
    }
    return Case(args, stock, args)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_linear(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
