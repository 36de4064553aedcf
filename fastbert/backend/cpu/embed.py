"""embed on the native CPU kernel, csrc/cpu/embed.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.cpu import (
    DTYPES,
    address,
    dropout_args,
    fp32,
    fresh,
    int64,
    native,
    unsupported_dropout,
    unsupported_dtype,
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
    if reason := unsupported_dtype("position", position) or unsupported_dropout(p):
        return reason
    for name, table in (
        ("ids" if word is None else "word", ids if word is None else word),
        ("type_", type_),
    ):
        if table is not None and table.dtype != position.dtype:
            return (
                f"{name} is {table.dtype} and position {position.dtype}: the cpu kernel takes tables of one dtype, "
                "cast one of them"
            )
    if position.shape[1] == 0:
        return "the tables have rows of no element: use the torch backend"
    if out_dtype not in DTYPES:
        return f"the output is {out_dtype} and the cpu kernel writes float32 and bfloat16: use the torch backend"
    return None


def _tables(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The six as the kernel reads them: ids (T,) int64 or None, positions, types, word (V, C), position, type_."""
    return (
        None if word is None else int64(ids),
        int64(positions),
        int64(types),
        (ids if word is None else word).contiguous(),
        position.contiguous(),
        None if type_ is None else type_.contiguous(),
    )


def _addresses(tables: tuple[Tensor | None, ...]) -> tuple[int, int, int, int, int, int]:
    ids, positions, types, word, position, type_ = map(address, tables)
    return ids, positions, types, word, position, type_


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
    count, width = ids.shape[0], position.shape[1]
    y = fresh(position, count, width, dtype=out_dtype)
    mean, rstd = (position.new_empty(count, dtype=torch.float32) for _ in range(2))
    if count > 0:
        tables = _tables(ids, positions, types, word, position, type_)
        weight, bias = fp32(weight), fp32(bias)
        native.embed_fwd(
            DTYPES[position.dtype],
            DTYPES[out_dtype],
            *_addresses(tables),
            weight.data_ptr(),
            bias.data_ptr(),
            y.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            count,
            width,
            eps,
            *dropout_args(p, seed, site),
            torch.get_num_threads(),
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
    tables = _tables(ids, positions, types, word, position, type_)
    wanted = (tables[3], position if position_grad else None, type_)
    dword, dposition, dtype_table = (
        fresh(position, *((0,) if t is None else t.shape)) for t in wanted
    )
    dweight, dbias = (position.new_empty(position.shape[1], dtype=torch.float32) for _ in range(2))
    if dy.shape[0] == 0:
        for t in (dword, dposition, dtype_table, dweight, dbias):
            t.zero_()
        return dword, dposition, dtype_table, dweight.to(weight.dtype), dbias
    weight32 = fp32(weight)
    native.embed_bwd(
        DTYPES[position.dtype],
        DTYPES[dy.dtype],
        dy.data_ptr(),
        *_addresses(tables),
        address(weight32),
        mean.data_ptr(),
        rstd.data_ptr(),
        dword.data_ptr(),
        dposition.data_ptr() if position_grad else 0,
        dtype_table.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        dy.shape[0],
        position.shape[1],
        dword.shape[0],
        position.shape[0],
        dtype_table.shape[0],
        -1 if padding_idx is None else padding_idx,
        -1 if position_padding_idx is None else position_padding_idx,
        *dropout_args(p, seed, site),
        torch.get_num_threads(),
    )
    return dword, dposition, dtype_table, dweight.to(weight.dtype), dbias
