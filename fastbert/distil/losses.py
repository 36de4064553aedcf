"""The losses of a distillation, each a sum over its terms; the trainer divides it by their number in the whole step.

soft, cosine: Sanh et al., DistilBERT (2019), after Hinton et al. (2015). hidden, attention: Jiao et al., TinyBERT
(2020). relations: Wang et al., MiniLMv2 (2021). vectors: Reimers and Gurevych (2020).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert import functional as F
from fastbert.distil.plan import TERMS, Plan
from fastbert.distil.signals import Signals
from fastbert.distil.soft_targets import soft_targets, soft_targets_mlm
from fastbert.nn.packing import Packing


class Losses(nn.Module):
    """The losses of a plan, with the learned map from the student's width to the teacher's where `hidden` needs one."""

    def __init__(self, plan: Plan, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.plan = plan
        mapped = "hidden" in plan.weights and student_width != teacher_width
        self.map = nn.Linear(student_width, teacher_width, bias=False) if mapped else None

    def forward(
        self, student: Signals, teacher: Signals, packing: Packing, counts: dict[str, int]
    ) -> Tensor:
        """(L,) fp32, in the order of the plan: weight x sum over a loss's terms / their number in the step."""
        found = [
            weight
            * getattr(self, f"_{name}")(student, teacher, packing).float()
            / counts[TERMS[name]]
            for name, weight in self.plan.weights.items()
        ]
        return torch.stack(found)

    def _labels(self, student: Signals, teacher: Signals, packing: Packing) -> Tensor:
        assert student.own_loss is not None
        return student.own_loss

    def _soft(self, student: Signals, teacher: Signals, packing: Packing) -> Tensor:
        t = self.plan.temperature
        if student.decoded is not None and teacher.decoded is not None:
            return soft_targets_mlm(*student.decoded, *teacher.decoded, temperature=t)
        pairs = zip(student.scores, teacher.scores, strict=True)
        found = [soft_targets(own, theirs, t, "sum") for own, theirs in pairs]
        return torch.stack(found).mean()

    def _cosine(self, student: Signals, teacher: Signals, packing: Packing) -> Tensor:
        """1 - cosine of the last hidden states."""
        own, theirs = student.hidden[max(student.hidden)], teacher.hidden[max(teacher.hidden)]
        return (1.0 - tnf.cosine_similarity(own.float(), theirs.float())).sum()

    def _hidden(self, student: Signals, teacher: Signals, packing: Packing) -> Tensor:
        """Mean square distance of the embeddings and of the layers' outputs, a sum over them."""
        found = []
        for own, theirs in self.plan.hidden:
            x, y = student.hidden[own], teacher.hidden[theirs]
            x = x if self.map is None else self.map(x)
            found.append((x.float() - y.float()).square().mean(1).sum())
        return torch.stack(found).sum()

    def _attention(self, student: Signals, teacher: Signals, packing: Packing) -> Tensor:
        """Square distance of the scores before the softmax, a mean over heads and a sum over layers."""
        found = [
            score_distance(student.projections[own], teacher.projections[theirs], packing)
            for own, theirs in self.plan.attention
        ]
        return torch.stack(found).sum()

    def _relations(self, student: Signals, teacher: Signals, packing: Packing) -> Tensor:
        """KL divergence of the relations of queries, of keys and of values, a mean over heads and over the three."""
        ((own, theirs),) = self.plan.relations
        heads = self.plan.relation_heads
        pairs = zip(
            student.projections[own].unbind(1), teacher.projections[theirs].unbind(1), strict=True
        )
        batch = (packing.cu_seqlens, packing.max_seqlen, heads)
        found = [
            F.relation_loss(z.flatten(1), y.to(z.dtype).flatten(1), *batch, reduction="sum")
            for z, y in pairs
        ]
        return torch.stack(found).mean() / heads

    def _vectors(self, student: Signals, teacher: Signals, packing: Packing) -> Tensor:
        """Square distance of the vectors / the teacher's square length: 2 - 2 cosine for vectors of length 1."""
        assert student.vectors is not None
        assert teacher.vectors is not None
        own, theirs = student.vectors.float(), teacher.vectors.float()
        distance = (own - theirs).square().sum(1)
        return (distance / theirs.square().sum(1).clamp(min=1e-12)).sum()


def score_distance(student: Tensor, teacher: Tensor, packing: Packing) -> Tensor:
    """Sum over pairs of tokens of one sequence, mean over heads, of (q k / sqrt(D) - q' k' / sqrt(D'))^2.

    `student` (T, 3, H, D) and `teacher` (T, 3, H, D') are queries, keys and values; values are not read. No tensor of
    size S x S is made, since sum_st (q_s k_t) (q'_s k'_t) = sum_ij (sum_s q_si q'_sj) (sum_t k_ti k'_tj).
    """
    with torch.autocast(student.device.type, enabled=False):
        grids = [
            packing.spread(z[:, :2].float()).permute(2, 0, 3, 1, 4) for z in (student, teacher)
        ]
        (q, k), (other_q, other_k) = ((g[0], g[1] * g.shape[-1] ** -0.5) for g in grids)
        total = _products(q, k, q, k) + _products(other_q, other_k, other_q, other_k)
        return (total - 2 * _products(q, k, other_q, other_k)) / student.shape[2]


def _products(q: Tensor, k: Tensor, other_q: Tensor, other_k: Tensor) -> Tensor:
    """The sum over pairs of tokens of (q k) (q' k'); (B, H, S, D) each, zeros at padding."""
    return ((q.mT @ other_q) * (k.mT @ other_k)).sum()


def terms(batch: Any, labels: int) -> dict[str, int]:
    """The number of each kind of term in a batch."""
    lengths = batch["cu_seqlens"].long().diff()
    return {
        "labels": labels,
        "tokens": len(batch["input_ids"]),
        "pairs": int(lengths.square().sum()),
        "sequences": len(lengths),
    }
