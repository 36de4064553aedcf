"""relation_loss by stock ops on padded sequences, a block of rows at a time: there is no tensor of S x S.

Products are fp32 for bf16 and fp16 too: stock's would round them, and a loss is the small difference of large scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backend.stock._layout import Layout

# elements of a block of scores
_SCORES = 1 << 22


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def _heads(layout: Layout, z: Tensor, num_heads: int) -> Tensor:
    """(T, H D) -> (B, H, S, D) in fp32, or fp64 where z is."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return layout.pad(wide.unflatten(1, (num_heads, -1)))


def _blocks(layout: Layout, num_heads: int) -> Iterator[slice]:
    """The rows of each block."""
    size = max(1, _SCORES // (layout.B * num_heads * layout.S))
    return (slice(first, first + size) for first in range(0, layout.S, size))


def _relation(layout: Layout, z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """log softmax of these rows of the relation of z (B, H, S, D), and each row's m and e as the reference has them."""
    scale = z.shape[3] ** -0.5
    scores = layout.scores(z[:, :, rows], z, scale)
    logs = scores.log_softmax(-1)
    return logs, torch.stack([scores.amax(-1) / scale, (-logs.amax(-1)).exp()], -1)


def forward(
    student: Tensor,  # (T, H D)
    teacher: Tensor,  # (T, H D')
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    num_heads: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss (), and m and e of student and teacher (2, H, T), empty without `save`; all fp32."""
    T, wide = student.shape[0], torch.promote_types(student.dtype, torch.float32)
    loss = student.new_zeros((), dtype=wide)
    if T == 0 or max_seqlen == 0 or cu_seqlens.shape[0] == 1:
        none = (2, num_heads, T if save else 0)
        return loss, loss.new_zeros(none), loss.new_zeros(none)
    layout = Layout(cu_seqlens, T, max_seqlen)
    z, target = (_heads(layout, t, num_heads) for t in (student, teacher))
    padding = ~layout.valid
    stats = []
    for rows in _blocks(layout, num_heads):
        log_p, of_student = _relation(layout, z, rows)
        log_q, of_teacher = _relation(layout, target, rows)
        # -inf - -inf at padding
        apart = (log_q - log_p).masked_fill_(padding[:, None, None, :], 0.0)
        each = (log_q.exp_() * apart).sum(-1)
        loss = loss + each.masked_fill_(padding[:, None, rows], 0.0).sum()
        if save:
            stats.append((of_student, of_teacher))
    if not save:
        return loss, loss.new_empty(2, num_heads, 0), loss.new_empty(2, num_heads, 0)
    joined = (torch.cat(parts, 2) for parts in zip(*stats, strict=True))
    of_student, of_teacher = (layout.unpad(t).permute(2, 1, 0).contiguous() for t in joined)
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
    """dstudent (T, H D), zeros from cu_seqlens[-1] on; the softmax runs again, the saved m and e are not read."""
    T = student.shape[0]
    if T == 0 or max_seqlen == 0 or cu_seqlens.shape[0] == 1:
        return torch.zeros_like(student)
    layout = Layout(cu_seqlens, T, max_seqlen)
    z, target = (_heads(layout, t, num_heads) for t in (student, teacher))
    dz = torch.zeros_like(z)
    for rows in _blocks(layout, num_heads):
        p, q = (_relation(layout, t, rows)[0].exp_() for t in (z, target))
        # a row of padding repeats a real row: its gradient must not count
        ds = (p - q).masked_fill_(~layout.valid[:, None, rows, None], 0.0)
        dz[:, :, rows] += ds @ z
        dz += ds.mT @ z[:, :, rows]
    dz *= dloss * z.shape[3] ** -0.5
    return layout.unpad(dz).flatten(1).to(student.dtype)
