"""attention on packed sequences, against SDPA on the padded batch with a mask, or without padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.opbench import DTYPES, HEAD, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "attention"
MIX = (128, 30, 45, 22, 80, 17, 60, 33)
GRID = (
    grid(SLUG, variant="padded")
    + grid(SLUG, widths=(768,), variant="padded-dropout")
    + grid(SLUG, (512, 4096), (768,), variant="full")
    + grid(SLUG, (512, 4096), (768,), "bf16", "padded")
    + grid(SLUG, (512,), (768,), "bf16", "padded-dropout")
)


def lengths_of(T: int, variant: str) -> tuple[int, ...]:
    """Lengths that add up to T: 128 each, or those of MIX in turn; a length that no longer fits is skipped."""
    if variant == "full":
        return (128,) * (T // 128) + ((T % 128,) if T % 128 else ())
    lengths: list[int] = []
    mix = itertools.cycle(MIX)
    while left := T - sum(lengths):
        fitting = (length for length in itertools.islice(mix, len(MIX)) if length <= left)
        lengths.append(next(fitting, left))
    return tuple(lengths)


def stock(qkv: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """The stock calls that a user writes, for qkv (B, S, 3, H, D) and a mask (B, 1, 1, S), True at tokens."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    return y.transpose(1, 2).flatten(2)


def build(spec: Spec) -> Case:
    """Heads of 64."""
    draw = Draw(DTYPES[spec.dtype])
    heads, lengths = max(spec.C // HEAD, 1), lengths_of(spec.T, spec.variant)
    packed = draw.normal(spec.T, 3, heads, spec.C // heads)
    p = 0.1 if spec.variant.endswith("dropout") else 0.0
    ours = {
        "qkv": packed,
        "cu_seqlens": draw.cu_seqlens(*lengths),
        "max_seqlen": max(lengths),
    }
    if p:
        ours |= {"p": p, "seed": draw.seed()}
    padded = torch.nn.utils.rnn.pad_sequence(list(packed.split(list(lengths))), batch_first=True)
    token = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = None if bool(token.all()) else token[:, None, None, :]
    return Case(ours, stock, {"qkv": padded, "mask": mask, "p": p})


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_attention(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
