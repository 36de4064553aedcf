"""relation_loss: how far a student's self-attention relations are from a teacher's, nothing of size S x S kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.relation_loss import eager
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import once_differentiable, record, register, sums, wants_grad
from fastbert.ops.context import autocast, exported_as


def _fwd_check(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor, max_seqlen: int, *_: Any
) -> None:
    _check.cu_seqlens_valid(cu_seqlens, student.shape[0], max_seqlen)


def _fwd_fake(
    student: Tensor,
    teacher: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    save: bool,
    backend: str,
) -> Any:
    loss = student.new_empty((), dtype=sums(student))
    stats = (2, num_heads, student.shape[0] if save else 0)
    return loss, loss.new_empty(stats), loss.new_empty(stats)


def _bwd_fake(dloss: Tensor, student: Tensor, *_: Any) -> Any:
    return torch.empty_like(student)


_fwd = register(
    "relation_loss",
    "forward",
    "(Tensor student, Tensor teacher, Tensor cu_seqlens, SymInt max_seqlen, int num_heads, bool save) "
    "-> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_check,
    tuned_by=TunedBy(dtype="student", sizes="student", rows="student", of_row=True),
)
_bwd = register(
    "relation_loss",
    "backward",
    "(Tensor dloss, Tensor student, Tensor teacher, Tensor student_stats, Tensor teacher_stats, "
    "Tensor cu_seqlens, SymInt max_seqlen, int num_heads) -> Tensor",
    _bwd_fake,
    tuned_by=TunedBy(dtype="student", sizes="student", rows="student", of_row=True),
)


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        backend: str,
    ) -> Tensor:
        args = (student, teacher, cu_seqlens, max_seqlen, num_heads)
        loss, *stats = _fwd(*args, True, backend)
        ctx.save_for_backward(student, teacher, *stats, cu_seqlens)
        ctx.scalars = (max_seqlen, num_heads, backend)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        # no gradient of the teacher, which is a constant
        wanted = ctx.needs_input_grad[0]
        return _bwd(dloss, *ctx.saved_tensors, *ctx.scalars) if wanted else None, *[None] * 5


def _check_heads(student: Tensor, teacher: Tensor, num_heads: int) -> None:
    """Refuse tensors of other shapes than (T, C) with one T, and heads that do not divide both widths."""
    _check.shape("student", student, -1, -1)
    _check.shape("teacher", teacher, student.shape[0], -1)
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}: pass the number of relation heads, at least 1")
    for name, z in (("student", student), ("teacher", teacher)):
        if z.shape[1] == 0 or z.shape[1] % num_heads:
            raise ValueError(
                f"{name} has {z.shape[1]} columns, which {num_heads} heads do not divide: "
                "choose num_heads among the common divisors of both widths"
            )


@exported_as(eager)
def relation_loss(
    student: Tensor,  # (T, C)
    teacher: Tensor,  # (T, C')
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    num_heads: int,
    *,
    reduction: str = "mean",
) -> Tensor:
    """KL divergence of the student's self-attention relations from the teacher's -> fp32 scalar.

    student and teacher hold the queries, the keys or the values of one layer each, of the same packed tokens. Both are
    split into num_heads relation heads, whatever the layers' own heads; the head sizes D may differ. The relation of a
    head is softmax(Z Z^T / sqrt(D)) inside each sequence, its loss KL(teacher's row || student's row). Sequence b is
    rows cu_seqlens[b] to cu_seqlens[b + 1]; rows past cu_seqlens[-1] are not read.

    reduction: "mean" over heads and rows, so that each token of a batch counts the same, 0 and connected to the graph
    if there is no row; or "sum". The teacher is a constant and gets no gradient. Saves student, teacher, and the
    largest product and the sum of exponentials of each row. Memory grows with T, not with the square of a length. Under
    autocast both are cast. Refuses shapes that don't fit, mixed dtypes, num_heads that do not divide both widths, and
    on the CPU cu_seqlens that fall or run past T. Wang et al. 2021 (MiniLMv2); Dao et al. 2022 (flash attention).
    """
    _check.floating(student=student, teacher=teacher)
    _check_heads(student, teacher, num_heads)
    _check.sequences(cu_seqlens, max_seqlen)
    _check.one_of("reduction", reduction, ("mean", "sum"))
    _check.same_device(student=student, teacher=teacher, cu_seqlens=cu_seqlens)
    student, teacher = autocast(student).contiguous(), autocast(teacher).contiguous()
    if student.dtype != teacher.dtype:
        raise TypeError(f"student is {student.dtype} and teacher {teacher.dtype}: cast one of them")
    args = (student, teacher, cu_seqlens.contiguous(), max_seqlen, num_heads)
    save = wants_grad(student, teacher)
    backend = choose("relation_loss", student.device, *args, save)
    total = record(_RelationLoss, *args, backend) if save else _fwd(*args, False, backend)[0]
    return total if reduction == "sum" else total / (num_heads * cu_seqlens[-1].clamp(min=1))
