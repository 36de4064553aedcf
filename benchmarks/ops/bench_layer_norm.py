"""layer_norm, against F.layer_norm."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "layer_norm"
GRID = grid(SLUG) + grid(SLUG, (512, 4096), (768,), "bf16")


def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The stock calls that a user writes."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def build(spec: Spec) -> Case:
    """Rows of C."""
    draw = Draw(DTYPES[spec.dtype])
    args = {
        "x": draw.normal(spec.T, spec.C),
        "weight": draw.normal(spec.C, mean=1.0, scale=0.2),
        "bias": draw.normal(spec.C),
    }
    return Case(args, stock, args)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_layer_norm(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
