"""mlm_loss with 15 % labelled rows, against the usual way: decoder on all rows, then F.cross_entropy."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import DTYPES, FAST_BF16, VOCAB, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "mlm_loss"
GRID = grid(SLUG) + grid(SLUG, (512 if FAST_BF16 else 64,), (768 if FAST_BF16 else 384,), "bf16")


def stock(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """The stock calls that a user writes, as in transformers."""
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=-100)


def build(spec: Spec) -> Case:
    """BERT's vocabulary."""
    draw = Draw(DTYPES[spec.dtype])
    args = {
        "hidden": draw.normal(spec.T, spec.C),
        "weight": draw.normal(VOCAB, spec.C, scale=spec.C**-0.5),
        "bias": draw.normal(VOCAB),
        "labels": draw.labels(VOCAB, spec.T, 0.15),
    }
    return Case(args, stock, args)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_mlm_loss(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
