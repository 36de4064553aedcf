"""embed: word, position and type embeddings, LayerNorm, dropout, against the five stock calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import DTYPES, VOCAB, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "embed"
GRID = grid(SLUG) + grid(SLUG, (512, 4096), (768,), "bf16")


def stock(
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
) -> Tensor:
    """The stock calls that a user writes."""
    z = F.embedding(ids, word) + F.embedding(positions, position) + F.embedding(types, type_)
    return F.dropout(F.layer_norm(z, z.shape[-1:], weight, bias, 1e-12), p)


def build(spec: Spec) -> Case:
    """BERT's tables; sequences of 128 tokens."""
    draw = Draw(DTYPES[spec.dtype])
    args = {
        "ids": draw.ids(VOCAB, spec.T),
        "positions": torch.arange(spec.T) % 128,
        "types": draw.ids(2, spec.T),
        "word": draw.normal(VOCAB, spec.C),
        "position": draw.normal(512, spec.C),
        "type_": draw.normal(2, spec.C),
        "weight": draw.normal(spec.C, mean=1.0, scale=0.2),
        "bias": draw.normal(spec.C),
        "p": 0.1,
    }
    return Case({**args, "seed": draw.seed()}, stock, args)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_embed(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
