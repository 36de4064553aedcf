"""relation_loss: KL divergence of a student's self-attention relations from a teacher's (Wang et al. 2021, MiniLMv2).

The relation of a head is softmax(Z Z^T / sqrt(D)) of one sequence, with Z (L, D) a head's share of queries, keys or
values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, nbytes


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(start, end) of every sequence that has a token."""
    return [(start, end) for start, end in itertools.pairwise(cu_seqlens.tolist()) if end > start]


def _heads(z: Tensor, num_heads: int) -> Tensor:
    """(L, H D) -> (H, L, D)."""
    return z.unflatten(1, (num_heads, -1)).transpose(0, 1)


def _relation(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(z z^T / sqrt(D)) (H, L, L), the largest product m and the sum e of each row (H, L), for z (H, L, D).

    With products z z^T, m is their maximum over a row, and e the sum of exp((product - m) / sqrt(D)). The two
    together rebuild a row's softmax without the rounding error of log-sum-exp = m / sqrt(D) + log e.
    """
    products = z @ z.transpose(1, 2)
    m = products.amax(-1)
    scores = (products - m[..., None]) * z.shape[2] ** -0.5
    e = scores.exp().sum(-1)
    return scores - e.log()[..., None], m, e


def forward(
    student: Tensor,  # (T, H D)
    teacher: Tensor,  # (T, H D'), a constant
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    num_heads: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), summed over heads and rows, and m and e of both (2, H, T), empty without `save`; all fp32.

    loss = sum over h, i, j of P'_ij (log P'_ij - log P_ij), with P the relation of student, P' that of teacher. Rows
    from cu_seqlens[-1] on are not read; their m and e are 0.
    """
    T = student.shape[0]
    wide, target = widen(student, teacher.detach())
    loss, done = wide[:0].sum(), 0
    stats: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start, end in _spans(cu_seqlens):
        log_p, *of_student = _relation(_heads(wide[start:end], num_heads))
        log_q, *of_teacher = _relation(_heads(target[start:end], num_heads))
        loss = loss + (log_q.exp() * (log_q - log_p)).sum()
        for known, new in zip(stats, (of_student, of_teacher), strict=True):
            known.append(torch.stack(new))
        done = end
    if not save:
        return loss, wide.new_empty(2, num_heads, 0), wide.new_empty(2, num_heads, 0)
    tail = wide.new_zeros(2, num_heads, T - done)
    student_stats, teacher_stats = (torch.cat([*known, tail], 2) for known in stats)
    return loss, student_stats, teacher_stats


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
    """dstudent (T, H D) in student's dtype, zeros from cu_seqlens[-1] on.

    With S = Z Z^T / sqrt(D), dS = dloss (P - P'). Z is on both sides of the product:
        dZ = (dS + dS^T) Z / sqrt(D)
    """
    wide, target = widen(student, teacher)
    dz = torch.zeros_like(wide)
    for start, end in _spans(cu_seqlens):
        z = _heads(wide[start:end], num_heads)
        log_p, log_q = _relation(z)[0], _relation(_heads(target[start:end], num_heads))[0]
        ds = dloss * (log_p.exp() - log_q.exp())
        grad = (ds @ z + ds.transpose(1, 2) @ z) * z.shape[2] ** -0.5
        dz[start:end] = grad.transpose(0, 1).flatten(1)
    return dz.to(student.dtype)


def eager(
    student: Tensor,
    teacher: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Stock ops in the tested dtype, one sequence at a time."""
    loss, rows = student[:0].sum(), 0
    for start, end in _spans(cu_seqlens):
        logs = []
        for z in (student, teacher.detach()):
            z = _heads(z[start:end], num_heads)
            logs.append((z @ z.transpose(1, 2) * z.shape[2] ** -0.5).log_softmax(-1))
        log_p, log_q = logs
        loss = loss + kl_div(log_p, log_q, reduction="sum", log_target=True)
        rows += end - start
    return loss if reduction == "sum" else loss / max(num_heads * rows, 1)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.relation_loss`."""
    draw = Draw(dtype, device, seed)

    def call(
        lengths: tuple[int, ...],
        H: int,
        D: int,
        of_teacher: int,
        tail: int = 0,
        scale: float = 1.0,
        **options: object,
    ) -> dict:
        T = sum(lengths)
        z, target = (draw.normal(T + tail, H * size, scale=scale) for size in (D, of_teacher))
        if tail:
            z[T:], target[T:] = float("nan"), float("nan")
        return {
            "student": z,
            "teacher": target,
            "cu_seqlens": draw.cu_seqlens(*lengths),
            "max_seqlen": max(lengths, default=0),
            "num_heads": H,
            **options,
        }

    yield Sample("S1-H1-D1-1", call((1,), 1, 1, 1), "one token, whose loss is 0")
    yield Sample("S5-3-1-H2-D3-5", call((5, 3, 1), 2, 3, 5), "odd head sizes, the teacher's wider")
    yield Sample("S5-3-H2-D4-2-sum", call((5, 3), 2, 4, 2, reduction="sum"), "sum")
    yield Sample("S33-17-H3-D32-64", call((33, 17), 3, 32, 64), "a student of half the width")
    yield Sample("S4-0-3-H2-D8-8", call((4, 0, 3), 2, 8, 8), "an empty sequence")
    yield Sample(
        "tail", call((13, 12), 2, 8, 4, tail=3), "rows past the end: never read, zeros out"
    )
    equal = call((6, 5), 2, 4, 4)
    yield Sample(
        "equal", equal | {"teacher": equal["student"].clone()}, "no divergence: exactly 0, not NaN"
    )
    yield Sample("large", call((9, 4), 1, 4, 4, scale=6.0), "rows with all weight on one key")
    yield Sample("S130-H1-D80-24", call((130,), 1, 80, 24), "longer than a tile, a narrow teacher")
    yield Sample("S129-7-H2-D8-16", call((129, 7), 2, 8, 16), "longer than one tile, by one")
    yield Sample("S23-H1-D150-260", call((23,), 1, 150, 260, scale=0.4), "heads above 128")
    yield Sample("empty", call((), 2, 8, 4), "no token: 0, connected")


def cost(
    student: Tensor,
    teacher: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    **_: object,
) -> Cost:
    """Reads both; a product of 2 L^2 D each forward. backward has both products again, and one for dstudent."""
    pairs = sum((end - start) ** 2 for start, end in _spans(cu_seqlens))
    of_student, of_teacher = (2 * pairs * z.shape[1] for z in (student, teacher))
    moved = nbytes(student, teacher)
    return Cost(
        moved, of_student + of_teacher, moved + nbytes(student), 2 * of_student + of_teacher
    )
