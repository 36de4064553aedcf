"""embed by torch's embedding and native_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend.reference import philox
from fastbert.backend.stock import layer_norm


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    if ids.device.type == "cpu":
        return torch.nn.functional.embedding(ids, table)  # the op's body has checked the ids
    # without a check an out-of-range id must give NaN, never a bad read
    outside = (ids < 0) | (ids >= table.shape[0])
    rows = torch.nn.functional.embedding(ids.masked_fill(outside, 0), table)
    return rows.masked_fill(outside[:, None], float("nan"))


def _total(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
) -> Tensor:
    wide = torch.promote_types(position.dtype, torch.float32)
    z = (ids if word is None else _rows(word, ids)).to(wide) + _rows(position, positions)
    return z if types is None else z + _rows(type_, types)  # type: ignore[arg-type]


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
    seed: Tensor | None,
    site: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, C) in out_dtype, mean and rstd (T,) fp32."""
    z = _total(ids, positions, types, word, position, type_)
    y, mean, rstd = layer_norm.forward(z, weight.to(z.dtype), bias.to(z.dtype), eps)
    return philox.dropout(y, p, seed, site).to(out_dtype), mean, rstd


def _scatter(dz: Tensor, ids: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
    padding = -1 if padding_idx is None else padding_idx
    if ids.device.type != "cpu":
        outside = (ids < 0) | (ids >= table.shape[0])
        ids, dz = ids.masked_fill(outside, 0), dz.masked_fill(outside[:, None], 0.0)
    return torch.ops.aten.embedding_dense_backward(dz, ids, table.shape[0], padding, False).to(
        table.dtype
    )


def backward(
    dy: Tensor,  # (T, C)
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
    weight: Tensor,
    mean: Tensor,  # (T,)
    rstd: Tensor,  # (T,)
    p: float,
    seed: Tensor | None,
    site: int,
    padding_idx: int | None,
    position_padding_idx: int | None,
    position_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dword (or the ready embeddings' gradient), dposition, dtype_table, dweight, dbias; empty where there is none."""
    z = _total(ids, positions, types, word, position, type_)
    dln = philox.dropout(dy.to(z.dtype), p, seed, site)
    dz, dweight, dbias = layer_norm.backward(dln, z, weight.to(z.dtype), mean, rstd)
    dword = dz.to(ids.dtype, copy=True) if word is None else _scatter(dz, ids, word, padding_idx)
    empty = dy.new_empty
    dposition = (
        _scatter(dz, positions, position, position_padding_idx) if position_grad else empty(0)
    )
    dtype_table = empty(0) if types is None else _scatter(dz, types, type_, None)  # type: ignore[arg-type]
    return dword, dposition, dtype_table, dweight.to(weight.dtype), dbias
