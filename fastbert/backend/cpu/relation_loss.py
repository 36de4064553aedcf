"""relation_loss on the native CPU kernel, csrc/cpu/relation_loss.cpp: packed, exact softmaxes, no S x S tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cpu import DTYPES, address, fresh, native, unsupported_dtype


def unsupported(
    student: Tensor,  # (T, H D)
    teacher: Tensor,  # (T, H D')
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    num_heads: int,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    return unsupported_dtype("student", student)


def forward(
    student: Tensor,  # (T, H D)
    teacher: Tensor,  # (T, H D')
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    num_heads: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss (), and m and e of student and teacher (2, H, T), empty without `save`; all fp32."""
    T = student.shape[0]
    loss = student.new_empty((), dtype=torch.float32)
    of_student, of_teacher = (
        loss.new_empty(2, num_heads, T if save else 0) for _ in (student, teacher)
    )
    native.relation_loss_fwd(
        DTYPES[student.dtype],
        student.data_ptr(),
        teacher.data_ptr(),
        cu_seqlens.data_ptr(),
        loss.data_ptr(),
        address(of_student if save else None),
        address(of_teacher if save else None),
        T,
        cu_seqlens.shape[0] - 1,
        num_heads,
        student.shape[1] // num_heads,
        teacher.shape[1] // num_heads,
        torch.get_num_threads(),
    )
    return loss, of_student, of_teacher


def backward(
    dloss: Tensor,  # ()
    student: Tensor,  # (T, H D)
    teacher: Tensor,  # (T, H D')
    student_stats: Tensor,  # (2, H, T)
    teacher_stats: Tensor,  # (2, H, T)
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
) -> Tensor:
    """dstudent (T, H D), zeros from cu_seqlens[-1] on."""
    dstudent = fresh(student, *student.shape)
    native.relation_loss_bwd(
        DTYPES[student.dtype],
        float(dloss),
        student.data_ptr(),
        teacher.data_ptr(),
        student_stats.data_ptr(),
        teacher_stats.data_ptr(),
        cu_seqlens.data_ptr(),
        dstudent.data_ptr(),
        student.shape[0],
        cu_seqlens.shape[0] - 1,
        num_heads,
        student.shape[1] // num_heads,
        teacher.shape[1] // num_heads,
        torch.get_num_threads(),
    )
    return dstudent
