"""embed: y = dropout(LayerNorm(word[ids] + position[positions] + type[types])) (Devlin et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backend.reference import layer_norm, philox
from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, nbytes


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def _total(
    ids: Tensor,  # (T,) int64, or (T, C) ready embeddings when word is None
    positions: Tensor,  # (T,)
    types: Tensor | None,  # (T,)
    word: Tensor | None,  # (V, C)
    position: Tensor,  # (P, C)
    type_: Tensor | None,  # (Y, C)
) -> Tensor:
    """The sum of the embeddings (T, C) in the accumulation dtype."""
    wide_ids, wide_word, wide_position, wide_type = widen(
        ids if word is None else None, word, position, type_
    )
    z = (wide_ids if word is None else wide_word[ids]) + wide_position[positions]
    return z if types is None else z + wide_type[types]


def forward(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
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
    w, b = widen(weight, bias)
    y, mean, rstd = layer_norm.forward(z, w, b, eps)
    return philox.dropout(y, p, seed, site).to(out_dtype), mean, rstd


def _scatter(dz: Tensor, ids: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
    """The gradient of table[ids]: rows of dz summed by id; the padding row gets none."""
    grad = torch.zeros(table.shape, dtype=dz.dtype, device=dz.device).index_add(0, ids.long(), dz)
    if padding_idx is not None:
        grad[padding_idx] = 0
    return grad.to(table.dtype)


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
    dln = philox.dropout(widen(dy)[0], p, seed, site)
    dz, dweight, dbias = layer_norm.backward(dln, z, weight, mean, rstd)
    dword = dz.to(ids.dtype, copy=True) if word is None else _scatter(dz, ids, word, padding_idx)
    empty = dy.new_empty
    dposition = (
        _scatter(dz, positions, position, position_padding_idx) if position_grad else empty(0)
    )
    dtype_table = empty(0)
    if types is not None and type_ is not None:
        dtype_table = _scatter(dz, types, type_, None)
    return dword, dposition, dtype_table, dweight, dbias


def eager(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
) -> Tensor:
    """Stock ops in the tested dtype."""
    F = torch.nn.functional
    z = ids if word is None else F.embedding(ids, word, padding_idx)
    z = z + F.embedding(positions, position, position_padding_idx)
    if types is not None and type_ is not None:
        z = z + F.embedding(types, type_)
    return philox.dropout(layer_norm.eager(z, weight, bias, eps), p, seed, site)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.embed`."""
    draw = Draw(dtype, device, seed)

    def call(T: int, C: int, V: int = 11, P: int = 7, Y: int = 2, p: float = 0.0) -> dict:
        kwargs = {
            "ids": draw.ids(V, T),
            "positions": draw.ids(P, T),
            "types": draw.ids(Y, T) if Y else None,
            "word": draw.normal(V, C),
            "position": draw.normal(P, C),
            "type_": draw.normal(Y, C) if Y else None,
            "weight": draw.normal(C, mean=1.0, scale=0.2),
            "bias": draw.normal(C),
        }
        return kwargs | ({"p": p, "seed": draw.seed(), "site": 0} if p else {})

    yield Sample("T1-C3", call(1, 3), "one short row")
    yield Sample("T13-C5-drop", call(13, 5, p=0.1), "ids repeat: the scatter must add")
    yield Sample(
        "T13-C6-padding",
        call(13, 6) | {"padding_idx": 0, "position_padding_idx": 1},
        "no gradient at padding",
    )
    yield Sample("T63-C768-drop", call(63, 768, V=101, P=64, p=0.1), "BERT-base rows")
    yield Sample("notypes", call(9, 8, Y=0), "DistilBERT")
    ready = call(9, 8) | {"word": None, "ids": draw.normal(9, 8)}
    yield Sample("inputs-embeds", ready, "ready embeddings instead of ids")
    yield Sample("empty", call(0, 8, p=0.1), "no token")
    int32 = call(5, 4)
    yield Sample(
        "int32", int32 | {k: int32[k].int() for k in ("ids", "positions", "types")}, "int32 ids"
    )


def cost(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
    **_: object,
) -> Cost:
    """Forward reads each row that is named once and writes one a token; backward reads both and writes the tables."""
    rows = ids.shape[0] if word is None else ids.unique().numel()
    rows += positions.unique().numel() + (0 if types is None else types.unique().numel())
    row = position.shape[1] * position.element_size()
    moved, flops = (rows + ids.shape[0]) * row, 10 * ids.shape[0] * position.shape[1]
    tables = (ids if word is None else word, position, type_)
    return Cost(moved, flops, moved + nbytes(*tables), 2 * flops)
