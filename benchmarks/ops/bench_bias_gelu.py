"""bias_gelu: gelu(x + b), exact, on the feed-forward's rows of F = 4C, against the two stock calls."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "bias_gelu"
GRID = grid(SLUG) + grid(SLUG, (512, 4096), (768,), "bf16")


def stock(x: Tensor, bias: Tensor) -> Tensor:
    """The stock calls that a user writes."""
    return F.gelu(x + bias)


def build(spec: Spec) -> Case:
    """Rows of F = 4C."""
    draw = Draw(DTYPES[spec.dtype])
    args = {"x": draw.normal(spec.T, 4 * spec.C), "bias": draw.normal(4 * spec.C)}
    return Case(args, stock, args)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_bias_gelu(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
