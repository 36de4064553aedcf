"""dropout_add_layer_norm: BERT's post-LN step with dropout on, against the three stock calls."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "dropout_add_layer_norm"
GRID = grid(SLUG) + grid(SLUG, (512, 4096), (768,), "bf16")


def stock(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    """The stock calls that a user writes."""
    z = residual + F.dropout(x, p)
    return F.layer_norm(z, z.shape[-1:], weight, bias, 1e-12)


def build(spec: Spec) -> Case:
    """Our op computes its dropout from a seed, which a model draws once per step; stock draws a mask per call."""
    draw = Draw(DTYPES[spec.dtype])
    args = {
        "x": draw.normal(spec.T, spec.C),
        "residual": draw.normal(spec.T, spec.C),
        "weight": draw.normal(spec.C, mean=1.0, scale=0.2),
        "bias": draw.normal(spec.C),
        "p": 0.1,
    }
    return Case({**args, "seed": draw.seed()}, stock, args)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_dropout_add_layer_norm(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
