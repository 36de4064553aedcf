"""embed in Triton: gather, add, LayerNorm and dropout in one pass; backward without atomics.

backward writes dz once; `scatter` sums it by id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import (
    _launch,
    dense,
    dropout_args,
    unsupported_dropout,
    unsupported_dtype,
    unsupported_width,
)
from fastbert.kernels._embed_bwd import scatter
from fastbert.kernels._math import moments
from fastbert.kernels._reduce import sum_partials
from fastbert.kernels._rows import drop_rows, load_vector, row_gradient, store_sums


@triton.jit
def _gathered(table_ptr, ids_ptr, rows, size, N, C, cols):
    """table[ids[rows]] (ROWS, BLOCK_C) fp32, NaN where an id is out of range; without ids, table[rows]."""
    ids = rows.to(tl.int64)
    known = rows < N
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + rows, mask=rows < N, other=0).to(tl.int64)
        known = (ids >= 0) & (ids < size)
    inside = ((rows < N) & known)[:, None] & (cols < C)[None, :]
    found = tl.load(table_ptr + ids[:, None] * C + cols[None, :], mask=inside, other=0.0)
    return tl.where(known[:, None], found.to(tl.float32), float("nan"))


@triton.jit
def _total(
    ids_ptr, positions_ptr, types_ptr, word_ptr, position_ptr, type_ptr, rows, V, P, Y, N, C, cols
):
    """word[ids] + position[positions] + type[types], 0 outside."""
    z = _gathered(word_ptr, ids_ptr, rows, V, N, C, cols)
    z += _gathered(position_ptr, positions_ptr, rows, P, N, C, cols)
    if types_ptr is not None:
        z += _gathered(type_ptr, types_ptr, rows, Y, N, C, cols)
    return tl.where((rows < N)[:, None] & (cols < C)[None, :], z, 0.0)


@triton.jit(do_not_specialize=["N", "V", "P", "Y", "site", "threshold"])
def _embed_fwd_kernel(
    ids_ptr,  # (N,), or None: word is (N, C) then
    positions_ptr,  # (N,)
    types_ptr,  # (N,), or None
    word_ptr,  # (V, C)
    position_ptr,  # (P, C)
    type_ptr,  # (Y, C), or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    y_ptr,  # (N, C)
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    seed_ptr,  # (1,), or None
    N,
    V,
    P,
    Y,
    C: tl.constexpr,
    eps,
    site,
    threshold,
    scale,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # y = dropout(LayerNorm(word[ids] + position[positions] + type[types]))
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    z = _total(
        ids_ptr, positions_ptr, types_ptr, word_ptr, position_ptr, type_ptr, rows, V, P, Y, N, C, cols
    )  # fmt: skip
    centred, mean, rstd = moments(z, inside, C, eps)
    y = centred * rstd[:, None] * load_vector(weight_ptr, cols, C) + load_vector(bias_ptr, cols, C)
    wide: tl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth == 16
    y = drop_rows(y, inside, seed_ptr, rows, site, threshold, scale, ROWS, BLOCK_C, wide)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :], y, mask=inside)
    tl.store(mean_ptr + rows, mean, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit(do_not_specialize=["N", "V", "P", "Y", "site", "threshold"])
def _embed_bwd_kernel(
    dy_ptr,  # (N, C)
    ids_ptr,  # (N,), or None: word is (N, C) then
    positions_ptr,  # (N,)
    types_ptr,  # (N,), or None
    word_ptr,  # (V, C)
    position_ptr,  # (P, C)
    type_ptr,  # (Y, C), or None
    weight_ptr,  # (C,)
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    dz_ptr,  # (N, C)
    partial_ptr,  # (2, programs, C) fp32
    seed_ptr,  # (1,), or None
    N,
    V,
    P,
    Y,
    C: tl.constexpr,
    site,
    threshold,
    scale,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    # dz, the gradient of the sum of tables, and this program's sums of g xhat and g, with g = dropout(dy)
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_C)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    weight = load_vector(weight_ptr, cols, C)
    wide: tl.constexpr = dy_ptr.dtype.element_ty.primitive_bitwidth == 16
    for first in tl.range(program * ROWS, N, programs * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & (cols < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = drop_rows(g, inside, seed_ptr, rows, site, threshold, scale, ROWS, BLOCK_C, wide)
        z = _total(
            ids_ptr, positions_ptr, types_ptr, word_ptr, position_ptr, type_ptr, rows, V, P, Y, N, C, cols
        )  # fmt: skip
        dz, xhat = row_gradient(g, z, weight, None, mean_ptr, rstd_ptr, rows, inside, N, C)
        tl.store(dz_ptr + at, dz, mask=inside)
        dweight += g * xhat
        dbias += g
    store_sums(partial_ptr, dweight, dbias, cols, C)


def unsupported(
    ids: Tensor,  # (T,), or (T, C) when word is None
    positions: Tensor,  # (T,)
    types: Tensor | None,  # (T,)
    word: Tensor | None,  # (V, C)
    position: Tensor,  # (P, C)
    type_: Tensor | None,  # (Y, C)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    out_dtype: torch.dtype,
) -> str | None:
    """Why this call can't run here, from metadata only; None if it can."""
    tables = {"word": word} if word is not None else {"ids": ids}
    return (
        unsupported_dtype(**tables, position=position, type_=type_, weight=weight, bias=bias)
        or unsupported_width(position.shape[1])
        or unsupported_dropout(p)
    )


def _tables(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The arguments as the kernels read them: ids (T,) or None, positions, types, word (V, C), position, type_."""
    six = (
        None if word is None else ids,
        positions,
        types,
        ids if word is None else word,
        position,
        type_,
    )
    return tuple(map(dense, six))


def _sizes(word: Tensor | None, position: Tensor, type_: Tensor | None) -> tuple[int, int, int]:
    """V, P and Y, 0 where there is no table."""
    return (
        0 if word is None else word.shape[0],
        position.shape[0],
        0 if type_ is None else type_.shape[0],
    )


def forward(
    ids: Tensor,  # (T,), or (T, C) when word is None
    positions: Tensor,  # (T,)
    types: Tensor | None,  # (T,)
    word: Tensor | None,  # (V, C)
    position: Tensor,  # (P, C)
    type_: Tensor | None,  # (Y, C)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, C) in out_dtype, mean and rstd (T,) fp32."""
    N, C = ids.shape[0], position.shape[1]
    y = position.new_empty(N, C, dtype=out_dtype)
    mean, rstd = (position.new_empty(N, dtype=torch.float32) for _ in range(2))
    if N > 0:
        config = _launch.rows(C, _launch.arch(y.device))
        seed, site, threshold, scale = dropout_args(p, seed, site)
        _embed_fwd_kernel[(triton.cdiv(N, config.ROWS),)](
            *_tables(ids, positions, types, word, position, type_),
            dense(weight),
            dense(bias),
            y,
            mean,
            rstd,
            seed,
            N,
            *_sizes(word, position, type_),
            C,
            eps,
            site,
            threshold,
            scale,
            **vars(config),
        )
    return y, mean, rstd


def backward(
    dy: Tensor,  # (T, C)
    ids: Tensor,  # (T,), or (T, C) when word is None
    positions: Tensor,  # (T,)
    types: Tensor | None,  # (T,)
    word: Tensor | None,  # (V, C)
    position: Tensor,  # (P, C)
    type_: Tensor | None,  # (Y, C)
    weight: Tensor,  # (C,)
    mean: Tensor,  # (T,) fp32
    rstd: Tensor,  # (T,) fp32
    p: float,
    seed: Tensor | None,  # (1,) int64
    site: int,
    padding_idx: int | None,
    position_padding_idx: int | None,
    position_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dword (or the ready embeddings' gradient), dposition, dtype_table, dweight, dbias; empty where there is none."""
    N, C = dy.shape
    empty = position.new_empty
    if N == 0:
        return (
            torch.zeros_like(ids if word is None else word),
            torch.zeros_like(position) if position_grad else empty(0),
            empty(0) if type_ is None else torch.zeros_like(type_),
            torch.zeros_like(weight),
            position.new_zeros(C, dtype=torch.float32),
        )
    config = _launch.persistent_rows(C, _launch.arch(dy.device), True)
    programs = _launch.programs(N, config, dy.device, 12)
    partial = dy.new_empty(2, programs, C, dtype=torch.float32)
    # fp32: rounded to a table's dtype only after the sum
    dz = dy.new_empty(N, C, dtype=torch.float32)
    seed, site, threshold, scale = dropout_args(p, seed, site)
    _embed_bwd_kernel[(programs,)](
        dy,
        *_tables(ids, positions, types, word, position, type_),
        dense(weight),
        mean,
        rstd,
        dz,
        partial,
        seed,
        N,
        *_sizes(word, position, type_),
        C,
        site,
        threshold,
        scale,
        **vars(config),
    )
    dweight, dbias = sum_partials(partial, weight.dtype, torch.float32)
    dword = dz.to(ids.dtype) if word is None else scatter(dz, ids, word, padding_idx)
    dposition = (
        scatter(dz, positions, position, position_padding_idx) if position_grad else empty(0)
    )
    dtype_table = empty(0) if types is None or type_ is None else scatter(dz, types, type_, None)
    return dword, dposition, dtype_table, dweight, dbias
