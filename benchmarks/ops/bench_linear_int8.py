"""linear_int8: x w^T + b in integers, against F.linear in the dtype of x with the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import BF16_GEMM, DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.linear_int8 import quantize_rows, quantize_weight
from fastbert.backend.reference.samples import Draw

SLUG = "linear_int8"
GRID = grid(SLUG) + grid(SLUG, *BF16_GEMM, "bf16")


def build(spec: Spec) -> Case:
    """The attention's output projection, C to C. x has numbers that 12 bits hold, so that F.linear agrees."""
    dtype = DTYPES[spec.dtype]
    draw = Draw(torch.float32)
    q, a = quantize_rows(draw.normal(spec.T, spec.C), 12)
    x = (q * a[:, None]).to(dtype)
    integers, scale = quantize_weight(draw.normal(spec.C, spec.C, scale=spec.C**-0.5))
    bias = draw.normal(spec.C).to(dtype)
    # no leaf: F.linear computes no gradient of it either
    weight = (integers * scale[:, None]).to(dtype)

    def stock(x: Tensor, bias: Tensor) -> Tensor:
        """The stock call that a user writes."""
        return F.linear(x, weight, bias)

    ours = {"x": x, "weight": integers, "scale": scale, "bias": bias}
    return Case(ours, stock, {"x": x, "bias": bias})


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_linear_int8(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
