"""embed on the CUDA kernels, csrc/cuda/embed.cu: backward writes dz once, and sums it by sorted ids."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cuda import (
    DTYPES,
    address,
    code,
    dropout_args,
    int64,
    native,
    parameter,
    place,
    row_partials,
    unsupported_dropout,
    unsupported_dtype,
    unsupported_width,
)


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


class _Lookups:
    """ids, positions, types, then each table with its element type and size, as the kernels read them.

    Without word, token t reads row t of ids (T, C). Tensors that are converted live as long as this object.
    """

    def __init__(
        self,
        ids: Tensor,
        positions: Tensor,
        types: Tensor | None,
        word: Tensor | None,
        position: Tensor,
        type_: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        indices = (None if word is None else ids, positions, types)
        tables = (ids if word is None else word, position, None if types is None else type_)
        self._indices = [int64(t) for t in indices]
        self._tables = [parameter(t, dtype) for t in tables]

    def args(self) -> tuple[int, int, int, int, int, int, int, int, int, int, int, int]:
        """The native functions' arguments."""
        ids, positions, types = map(address, self._indices)
        word, position, type_ = (
            (address(t), code(t), 0 if t is None else t.shape[0]) for t in self._tables
        )
        return ids, positions, types, *word, *position, *type_


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
        lookups = _Lookups(ids, positions, types, word, position, type_, out_dtype)
        scale, shift = parameter(weight, out_dtype), parameter(bias, out_dtype)
        native.embed_fwd(
            DTYPES[out_dtype],
            *lookups.args(),
            address(scale),
            code(scale),
            address(shift),
            code(shift),
            y.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            *dropout_args(p, seed, site),
            N,
            C,
            eps,
            *place(y),
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
    empty = position.new_empty
    # rounded to a table's dtype once, after the sum
    dz = torch.empty_like(dy, dtype=torch.float32)
    lookups = _Lookups(ids, positions, types, word, position, type_, dy.dtype)
    dweight, dbias = _dz(dy, lookups, weight, mean, rstd, dropout_args(p, seed, site), dz)
    dword = dz.to(ids.dtype) if word is None else _scatter(dz, ids, word, padding_idx)
    dposition, dtype_table = empty(0), empty(0)
    if position_grad:
        dposition = _scatter(dz, positions, position, position_padding_idx)
    if type_ is not None and types is not None:
        dtype_table = _scatter(dz, types, type_, None)
    return dword, dposition, dtype_table, dweight, dbias


def _dz(
    dy: Tensor,  # (T, C)
    lookups: _Lookups,
    weight: Tensor,  # (C,)
    mean: Tensor,  # (T,) fp32
    rstd: Tensor,  # (T,) fp32
    dropout: tuple[int, int, int, float],
    dz: Tensor,  # (T, C) fp32, written
) -> tuple[Tensor, Tensor]:
    """dweight (C,) in weight's dtype and dbias (C,) fp32."""
    N, C = dy.shape
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = dy.new_empty(C, dtype=torch.float32)
    if N == 0:
        return dweight.zero_(), dbias.zero_()
    partial, scale = row_partials(dy), parameter(weight, dy.dtype)
    native.embed_bwd(
        DTYPES[dy.dtype],
        dy.data_ptr(),
        *lookups.args(),
        address(scale),
        code(scale),
        mean.data_ptr(),
        rstd.data_ptr(),
        dz.data_ptr(),
        partial.data_ptr(),
        dweight.data_ptr(),
        code(dweight),
        dbias.data_ptr(),
        partial.shape[1],
        *dropout,
        N,
        C,
        *place(dy),
    )
    return dweight, dbias


def _scatter(dz: Tensor, ids: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
    """The gradient of table[ids] for dz (N, C) fp32: rows of equal id summed in order, none for padding_idx."""
    N, C = dz.shape
    grad = torch.zeros_like(table, memory_format=torch.contiguous_format)
    if 0 in (N, table.shape[0]):
        return grad
    ids, order = torch.sort(ids.to(torch.int64), stable=True)
    chunks = -(-N // native.embed_chunk())
    partial = dz.new_empty(chunks, 2, C)
    native.embed_scatter(
        dz.data_ptr(),
        ids.data_ptr(),
        order.data_ptr(),
        grad.data_ptr(),
        code(grad),
        partial.data_ptr(),
        -1 if padding_idx is None else padding_idx,
        N,
        table.shape[0],
        C,
        *place(dz),
    )
    return grad
