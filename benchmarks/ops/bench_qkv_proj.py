"""qkv_proj: queries, keys and values in one GEMM; fused weight against one F.linear, three weights against three."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import BF16_GEMM, DTYPES, HEAD, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "qkv_proj"
GRID = (
    grid(SLUG) + grid(SLUG, (512, 4096), (768,), variant="split") + grid(SLUG, *BF16_GEMM, "bf16")
)


def fused(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """The stock calls that a user writes for one weight."""
    return F.linear(x, weight, bias).view(x.shape[0], 3, heads, -1)


def split(x: Tensor, weights: list[Tensor], biases: list[Tensor], heads: int) -> Tensor:
    """The stock calls for three weights; stacked, to compute the same result as our op."""
    parts = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    return torch.stack(parts, 1).view(x.shape[0], 3, heads, -1)


def build(spec: Spec) -> Case:
    """Heads of 64."""
    draw = Draw(DTYPES[spec.dtype])
    parts, heads = 3 if spec.variant == "split" else 1, max(spec.C // HEAD, 1)
    rows = 3 * spec.C // parts
    x = draw.normal(spec.T, spec.C)
    weights = [draw.normal(rows, spec.C, scale=spec.C**-0.5) for _ in range(parts)]
    biases = [draw.normal(rows) for _ in range(parts)]
    ours = {"x": x, "weights": weights, "biases": biases, "num_heads": heads}
    if parts == 3:
        return Case(ours, split, {"x": x, "weights": weights, "biases": biases, "heads": heads})
    return Case(ours, fused, {"x": x, "weight": weights[0], "bias": biases[0], "heads": heads})


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_qkv_proj(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
