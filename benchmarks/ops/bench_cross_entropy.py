"""cross_entropy of rows that are all labelled, against F.cross_entropy; T is N, C is V."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import DTYPES, VOCAB, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "cross_entropy"
# 4096 rows of the whole vocabulary would be 0.5 GB a tensor, of which stock holds several
GRID = (
    grid(SLUG, (64, 512), (VOCAB,))
    + grid(SLUG, (4096,), (8192,))
    + grid(SLUG, (512,), (VOCAB,), "bf16")
)


def stock(logits: Tensor, labels: Tensor) -> Tensor:
    """The stock calls that a user writes."""
    return F.cross_entropy(logits, labels)


def build(spec: Spec) -> Case:
    """Every row is labelled: ignored rows would cost our op less than stock."""
    draw = Draw(DTYPES[spec.dtype])
    args = {"logits": draw.normal(spec.T, spec.C), "labels": draw.ids(spec.C, spec.T)}
    return Case(args, stock, args)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_cross_entropy(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
