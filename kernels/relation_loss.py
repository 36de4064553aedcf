"""relation_loss in Triton: packed sequences, two exact softmaxes, tiles of scores that never leave the chip.

A program takes BLOCK_M rows of one (sequence, head). Sequence number B stands for the rows past cu_seqlens[-1], which
are zeroed and never read. forward passes over the keys twice: for the statistics of its rows, then for the loss. Scores
are symmetric, S_ij = S_ji: backward makes dS + dS^T for its own rows alone, from the maximum and the sum of every row
that forward saved. So it is one kernel with one more product for each tile of keys, without atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _launch, _tiles, unsupported_dtype
from fastbert.kernels._attend import load_tile, span, store_tile, zero_tail
from fastbert.kernels._configured import configured
from fastbert.kernels._math import LN2, LOG2E

# arguments that vary between calls; excluded from Triton's specialisation
_VARYING = ["T", "B", "BLOCKS"]


@triton.jit
def _zero_rows(ptr, stride, length, block, BLOCKS, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Fill COUNT rows of `length` numbers, `stride` apart, with zeros; BLOCKS programs share them."""
    for which in tl.static_range(COUNT):
        zero_tail(ptr + which * stride, 1, length, block, BLOCKS, ROWS, 1, 1)


@triton.jit
def _products(q, k, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """q k^T (BLOCK_M, BLOCK_N) fp32."""
    none = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return tl.dot(q, tl.trans(k), none, input_precision=PRECISION)


@triton.jit
def _gathered(stats, products, inside, scale):
    """The statistics m and e of each row (BLOCK_M,) with a tile of products (BLOCK_M, BLOCK_N) added.

    They start at 0. No row's maximum is below that: the product of a row with itself is a sum of squares. Keys past
    the end have products of 0 and raise no maximum.
    """
    m, e = stats
    top = tl.maximum(m, tl.max(products, 1))
    powers = tl.exp2((products - top[:, None]) * (scale * LOG2E))
    e = e * tl.exp2((m - top) * (scale * LOG2E)) + tl.sum(tl.where(inside, powers, 0.0), 1)
    return top, e


@triton.jit
def _divergence(p, q, u):
    """p - q - q u with u = log(p / q): the terms of sum q log(q / p), since p and q each add up to 1.

    Each is at least 0, and 0 where p is q, so that rounding errors of u hardly count where student and teacher agree.
    There p - q - q u = q (e^u - 1 - u) comes from its series.
    """
    series = u * (1 / 3628800) + (1 / 362880)
    series = series * u + (1 / 40320)
    series = series * u + (1 / 5040)
    series = series * u + (1 / 720)
    series = series * u + (1 / 120)
    series = series * u + (1 / 24)
    series = series * u + (1 / 6)
    series = series * u + 0.5
    return tl.where(tl.abs(u) < 1.0, q * (u * u * series), (p - q) - q * u)


@triton.jit(do_not_specialize=_VARYING)
def _relation_loss_fwd_kernel(
    student_ptr,  # (T, H, D)
    teacher_ptr,  # (T, H, DT)
    cu_ptr,  # (B + 1,)
    loss_ptr,  # (H, T)
    student_stats_ptr,  # (2, H, T), or None
    teacher_stats_ptr,  # (2, H, T), or None
    T,
    B,
    BLOCKS,
    scale,  # D^-1/2
    teacher_scale,  # DT^-1/2
    H: tl.constexpr,
    D: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # x = (product - m) scale,  e = sum e^x,  P = e^x / e, of student and teacher; loss = sum of _divergence(P, P')
    block, bh = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    b, h = bh // H, bh % H
    start, length = span(cu_ptr, b, B, T)
    row = start.to(tl.int64)
    # a row's place in losses and maxima, and how far behind its sum is
    at, second = h.to(tl.int64) * T + row, T.to(tl.int64) * H
    if b == B:
        _zero_rows(loss_ptr + at, second, length, block, BLOCKS, 1, BLOCK_M)
        if student_stats_ptr is not None:
            _zero_rows(student_stats_ptr + at, second, length, block, BLOCKS, 2, BLOCK_M)
            _zero_rows(teacher_stats_ptr + at, second, length, block, BLOCKS, 2, BLOCK_M)
        return
    if block * BLOCK_M >= length:
        return
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    student_ptr += row * (H * D) + h * D
    teacher_ptr += row * (H * DT) + h * DT
    q = load_tile(student_ptr, i, H * D, length, D, BLOCK_D)
    tq = load_tile(teacher_ptr, i, H * DT, length, DT, BLOCK_T)
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    of_student, of_teacher = (zeros, zeros), (zeros, zeros)
    for j0 in range(0, length, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        inside = (j < length)[None, :]
        k = load_tile(student_ptr, j, H * D, length, D, BLOCK_D)
        of_student = _gathered(
            of_student, _products(q, k, PRECISION, BLOCK_M, BLOCK_N), inside, scale
        )
        k = load_tile(teacher_ptr, j, H * DT, length, DT, BLOCK_T)
        products = _products(tq, k, PRECISION, BLOCK_M, BLOCK_N)
        of_teacher = _gathered(of_teacher, products, inside, teacher_scale)
    m, e = of_student
    teacher_m, teacher_e = of_teacher
    ratio = tl.log2(e / teacher_e) * LN2
    loss = zeros
    for j0 in range(0, length, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_tile(student_ptr, j, H * D, length, D, BLOCK_D)
        x = (_products(q, k, PRECISION, BLOCK_M, BLOCK_N) - m[:, None]) * scale
        k = load_tile(teacher_ptr, j, H * DT, length, DT, BLOCK_T)
        y = (_products(tq, k, PRECISION, BLOCK_M, BLOCK_N) - teacher_m[:, None]) * teacher_scale
        p = tl.exp2(x * LOG2E) / e[:, None]
        of = tl.exp2(y * LOG2E) / teacher_e[:, None]
        terms = _divergence(p, of, (x - y) - ratio[:, None])
        loss += tl.sum(tl.where((j < length)[None, :], terms, 0.0), 1)
    tl.store(loss_ptr + at + i, loss, mask=i < length)
    if student_stats_ptr is not None:
        tl.store(student_stats_ptr + at + i, m, mask=i < length)
        tl.store(student_stats_ptr + second + at + i, e, mask=i < length)
        tl.store(teacher_stats_ptr + at + i, teacher_m, mask=i < length)
        tl.store(teacher_stats_ptr + second + at + i, teacher_e, mask=i < length)


@triton.jit
def _stats(ptr, i, second, length):
    """The maximum and 1 / sum of rows i; 0 and 1 past the last row."""
    m = tl.load(ptr + i, mask=i < length, other=0.0)
    return m, 1.0 / tl.load(ptr + second + i, mask=i < length, other=1.0)


@triton.jit
def _both_ways(p, of_rows, of_keys, scale):
    """P_ij + P_ji from the products p (BLOCK_M, BLOCK_N) and the statistics of rows i and of keys j."""
    m, inverse = of_rows
    along = tl.exp2((p - m[:, None]) * (scale * LOG2E)) * inverse[:, None]
    m, inverse = of_keys
    return along + tl.exp2((p - m[None, :]) * (scale * LOG2E)) * inverse[None, :]


@triton.jit(do_not_specialize=_VARYING)
def _relation_loss_bwd_kernel(
    dloss_ptr,  # ()
    student_ptr,  # (T, H, D)
    teacher_ptr,  # (T, H, DT)
    student_stats_ptr,  # (2, H, T)
    teacher_stats_ptr,  # (2, H, T)
    cu_ptr,  # (B + 1,)
    dstudent_ptr,  # (T, H, D)
    T,
    B,
    BLOCKS,
    scale,  # D^-1/2
    teacher_scale,  # DT^-1/2
    H: tl.constexpr,
    D: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # dZ_i = scale dloss sum over j of (P_ij + P_ji - P'_ij - P'_ji) Z_j, with P' the relation of the teacher
    block, bh = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    b, h = bh // H, bh % H
    start, length = span(cu_ptr, b, B, T)
    row = start.to(tl.int64)
    dstudent_ptr += row * (H * D) + h * D
    if b == B:
        zero_tail(dstudent_ptr, H * D, length, block, BLOCKS, BLOCK_M, D, BLOCK_D)
        return
    if block * BLOCK_M >= length:
        return
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    student_ptr += row * (H * D) + h * D
    teacher_ptr += row * (H * DT) + h * DT
    second = T.to(tl.int64) * H
    student_stats_ptr += h.to(tl.int64) * T + row
    teacher_stats_ptr += h.to(tl.int64) * T + row
    q = load_tile(student_ptr, i, H * D, length, D, BLOCK_D)
    tq = load_tile(teacher_ptr, i, H * DT, length, DT, BLOCK_T)
    of_rows = _stats(student_stats_ptr, i, second, length)
    teacher_of_rows = _stats(teacher_stats_ptr, i, second, length)
    dz = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # in rows and keys past the end products, maxima and Z are 0: their exponentials are finite and add nothing
    for j0 in range(0, length, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_tile(student_ptr, j, H * D, length, D, BLOCK_D)
        tk = load_tile(teacher_ptr, j, H * DT, length, DT, BLOCK_T)
        of_keys = _stats(student_stats_ptr, j, second, length)
        teacher_of_keys = _stats(teacher_stats_ptr, j, second, length)
        p = _products(q, k, PRECISION, BLOCK_M, BLOCK_N)
        ds = _both_ways(p, of_rows, of_keys, scale)
        t = _products(tq, tk, PRECISION, BLOCK_M, BLOCK_N)
        ds -= _both_ways(t, teacher_of_rows, teacher_of_keys, teacher_scale)
        dz = tl.dot(ds.to(k.dtype), k, dz, input_precision=PRECISION)
    dz *= scale * tl.load(dloss_ptr)
    store_tile(dstudent_ptr, dz, i, H * D, length, D, BLOCK_D)


@dataclass(frozen=True)
class _Tiles:
    """Tiles of BLOCK_M rows and BLOCK_N keys; heads of student and teacher padded to BLOCK_D and BLOCK_T."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_T: int
    PRECISION: str
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True


def _padded(
    D: int, DT: int, dtype: torch.dtype, arch: _launch.Arch
) -> tuple[tuple[int, int, str], bool]:
    """BLOCK_D, BLOCK_T and PRECISION, and whether a head has more than 64 columns."""
    blocks = _tiles.head_block(D), _tiles.head_block(DT)
    return (*blocks, _tiles.precision(dtype, arch)), max(blocks) > 64


def _single(max_seqlen: int, D: int, DT: int, arch: _launch.Arch, stages: int) -> _Tiles:
    """Tiles of both directions in fp32: backward must compute the products of forward to the last bit.

    A row's probability of itself is near 1, and its rounding error is then the whole of its gradient.
    """
    fixed, wide = _padded(D, DT, torch.float32, arch)
    if wide:
        rows, keys = (32, 16) if isinstance(arch, str) else (16, 32)
        return _Tiles(rows, keys, *fixed, 8, 1)
    # with one stage forward spills on sm_80, with two on later GPUs
    stages = stages if arch == 80 else 1
    # narrow heads leave registers for more keys
    keys = 32 if max(fixed[:2]) == 16 else 16
    return _Tiles(_tiles.tile(max_seqlen, 32), keys, *fixed, 4, stages)


@configured("BLOCK_M", "BLOCK_N")
def _relation_loss_fwd(
    max_seqlen: int, D: int, DT: int, dtype: torch.dtype, arch: _launch.Arch
) -> _Tiles:
    """The second pass has both products of a tile in registers."""
    if dtype == torch.float32:
        return _single(max_seqlen, D, DT, arch, 2)
    fixed, wide = _padded(D, DT, dtype, arch)
    keys = 32 if wide or isinstance(arch, str) else 64
    return _Tiles(_tiles.tile(max_seqlen, 64), _tiles.tile(max_seqlen, keys), *fixed, 4, 2)


@configured("BLOCK_M", "BLOCK_N")
def _relation_loss_bwd(
    max_seqlen: int, D: int, DT: int, dtype: torch.dtype, arch: _launch.Arch
) -> _Tiles:
    """As forward, with the sum for dz in registers too."""
    if dtype == torch.float32:
        return _single(max_seqlen, D, DT, arch, 1)
    fixed, _ = _padded(D, DT, dtype, arch)
    return _Tiles(_tiles.tile(max_seqlen, 64), _tiles.tile(max_seqlen, 32), *fixed, 4, 2)


def unsupported(
    student: Tensor,  # (T, H D)
    teacher: Tensor,  # (T, H D')
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    num_heads: int,
    save: bool,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    size = max(student.shape[1], teacher.shape[1]) // num_heads
    if size > 128:
        return f"a relation head has {size} columns and the triton kernels go up to 128: use the torch backend"
    return unsupported_dtype(student=student)


def _scales(student: Tensor, teacher: Tensor, num_heads: int) -> tuple[int, int, float, float]:
    """Head sizes of student and teacher, and the factors of their scores."""
    D, DT = student.shape[1] // num_heads, teacher.shape[1] // num_heads
    return D, DT, D**-0.5, DT**-0.5


def forward(
    student: Tensor,  # (T, H D)
    teacher: Tensor,  # (T, H D')
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    num_heads: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss (), and m and e of student and teacher (2, H, T), empty without `save`; all fp32."""
    T, B = student.shape[0], cu_seqlens.shape[0] - 1
    losses = student.new_empty(num_heads, T, dtype=torch.float32)
    stats = [losses.new_empty(2, num_heads, T if save else 0) for _ in range(2)]
    if T > 0:
        D, DT, *scales = _scales(student, teacher, num_heads)
        arch = _launch.arch(student.device)
        config = _relation_loss_fwd(_tiles.tile(max_seqlen, 512), D, DT, student.dtype, arch)
        blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_M))
        _relation_loss_fwd_kernel[(blocks * num_heads * (B + 1),)](
            student,
            teacher,
            cu_seqlens,
            losses,
            *(stats if save else (None, None)),
            T,
            B,
            blocks,
            *scales,
            H=num_heads,
            D=D,
            DT=DT,
            **vars(config),
        )
    return losses.sum(dtype=torch.float64).to(torch.float32), stats[0], stats[1]


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
    T, B = student.shape[0], cu_seqlens.shape[0] - 1
    dstudent = torch.empty_like(student)
    if T > 0:
        D, DT, *scales = _scales(student, teacher, num_heads)
        arch = _launch.arch(student.device)
        config = _relation_loss_bwd(_tiles.tile(max_seqlen, 512), D, DT, student.dtype, arch)
        blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_M))
        _relation_loss_bwd_kernel[(blocks * num_heads * (B + 1),)](
            dloss,
            student,
            teacher,
            student_stats,
            teacher_stats,
            cu_seqlens,
            dstudent,
            T,
            B,
            blocks,
            *scales,
            H=num_heads,
            D=D,
            DT=DT,
            **vars(config),
        )
    return dstudent
