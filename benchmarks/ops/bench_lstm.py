"""lstm, one direction, on packed sequences, against the steps written out on the padded batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.bench_attention import lengths_of
from benchmarks.ops.opbench import BF16_GEMM, DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "lstm"
GRID = grid(SLUG, variant="padded") + grid(SLUG, *BF16_GEMM, "bf16", "padded")


@torch.compiler.disable
def stock(gates: Tensor, weight: Tensor, token: Tensor) -> Tensor:
    """The stock calls that a user writes, for (B, S, 4H) and a mask (B, S), True at tokens.

    torch.compile would write all steps one after the other, and take minutes.
    """
    h = c = gates.new_zeros(gates.shape[0], weight.shape[1])
    outputs = []
    for z in gates.unbind(1):
        i, f, g, o = (z + F.linear(h, weight)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1)[token]


def build(spec: Spec) -> Case:
    """C units."""
    draw, lengths = Draw(DTYPES[spec.dtype]), lengths_of(spec.T, spec.variant)
    gates, H = draw.normal(spec.T, 4 * spec.C), spec.C
    weight = draw.normal(4 * H, H, scale=H**-0.5)
    ours = {
        "gates": gates,
        "weights": [weight],
        "cu_seqlens": draw.cu_seqlens(*lengths),
        "max_seqlen": max(lengths),
    }
    padded = torch.nn.utils.rnn.pad_sequence(list(gates.split(list(lengths))), batch_first=True)
    token = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Case(ours, stock, {"gates": padded, "weight": weight, "token": token})


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_lstm(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
