"""rms_norm, against F.rms_norm."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "rms_norm"
GRID = grid(SLUG) + grid(SLUG, (512, 4096), (768,), "bf16")


def stock(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The stock call that a user writes."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def build(spec: Spec) -> Case:
    """Rows of C."""
    draw = Draw(DTYPES[spec.dtype])
    weight = draw.normal(spec.C, mean=1.0, scale=0.2)
    args = {"x": draw.normal(spec.T, spec.C), "weight": weight, "eps": 1e-6}
    return Case(args, stock, args)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_rms_norm(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
