"""relation_loss on packed sequences, against two softmaxes and a KL divergence on the padded batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.bench_attention import lengths_of
from benchmarks.ops.opbench import DTYPES, Case, Spec, grid, run_case
from fastbert.backend.reference.samples import Draw

SLUG = "relation_loss"
# columns of a relation head
SIZE = 32
GRID = grid(SLUG, variant="padded") + grid(SLUG, (512,), (384,), "bf16", "padded")


def stock(student: Tensor, teacher: Tensor, token: Tensor | None, num_heads: int) -> Tensor:
    """The stock calls that a user writes, for (B, S, C) and a mask (B, S), True at tokens."""
    logs = []
    for z in (student, teacher.detach()):
        z = z.unflatten(2, (num_heads, -1)).transpose(1, 2)
        scores = z @ z.mT * z.shape[-1] ** -0.5
        if token is not None:
            scores = scores.masked_fill(~token[:, None, None, :], -1e4)
        logs.append(scores.log_softmax(-1))
    each = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)  # (B, H, S)
    if token is None:
        return each.mean()
    return each.masked_fill(~token[:, None, :], 0.0).sum() / (num_heads * token.sum())


def build(spec: Spec) -> Case:
    """A teacher as wide as the student."""
    draw, lengths = Draw(DTYPES[spec.dtype]), lengths_of(spec.T, spec.variant)
    heads = spec.C // SIZE
    ours = {
        "student": draw.normal(spec.T, spec.C),
        "teacher": draw.normal(spec.T, spec.C),
        "cu_seqlens": draw.cu_seqlens(*lengths),
        "max_seqlen": max(lengths),
        "num_heads": heads,
    }
    student, teacher = (
        torch.nn.utils.rnn.pad_sequence(list(ours[name].split(list(lengths))), batch_first=True)
        for name in ("student", "teacher")
    )
    token = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = None if bool(token.all()) else token
    padded = {"student": student, "teacher": teacher, "token": mask, "num_heads": heads}
    return Case(ours, stock, padded)


@pytest.mark.parametrize("spec", GRID, ids=lambda s: s.id)
def test_relation_loss(benchmark, store, seconds, spec):
    run_case(benchmark, store, spec, build(spec), seconds)
