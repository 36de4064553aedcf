"""embed: gather + add + LayerNorm + dropout of word, position and token-type embeddings in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.embed import eager
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import (
    none_if_empty,
    once_differentiable,
    record,
    register,
    sums,
    wants_grad,
)
from fastbert.ops.context import autocast_dtype, exported_as, seed_for


def _fwd_check(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
    *_: Any,
) -> None:
    if word is not None:
        _check.word_ids(ids, word.shape[0])
    remedy = "shorten the input or enlarge max_position_embeddings"
    _check.ids_in_range("positions", positions, position.shape[0], remedy)
    if types is not None and type_ is not None:
        _check.ids_in_range("types", types, type_.shape[0], "token types start at 0")


def _fwd_fake(
    ids: Tensor, positions: Tensor, types: Any, word: Any, position: Tensor, *rest: Any
) -> Any:
    out_dtype, T, stat = rest[-2], ids.shape[0], sums(position)
    y = position.new_empty(T, position.shape[1], dtype=out_dtype)
    return y, position.new_empty(T, dtype=stat), position.new_empty(T, dtype=stat)


def _bwd_fake(
    dy: Tensor,
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
    weight: Tensor,
    *rest: Any,
) -> Any:
    position_grad = rest[-2]
    return (
        torch.empty_like(ids if word is None else word),
        torch.empty_like(position) if position_grad else dy.new_empty(0),
        dy.new_empty(0) if type_ is None else torch.empty_like(type_),
        torch.empty_like(weight),
        torch.empty_like(weight, dtype=sums(position)),
    )


_fwd = register(
    "embed",
    "forward",
    "(Tensor ids, Tensor positions, Tensor? types, Tensor? word, Tensor position, Tensor? type_, Tensor weight, "
    "Tensor bias, float eps, float p, Tensor? seed, int site, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_check,
    tuned_by=TunedBy(dtype="position", sizes="position", rows="ids"),
)
_bwd = register(
    "embed",
    "backward",
    "(Tensor dy, Tensor ids, Tensor positions, Tensor? types, Tensor? word, Tensor position, Tensor? type_, "
    "Tensor weight, Tensor mean, Tensor rstd, float p, Tensor? seed, int site, int? padding_idx, "
    "int? position_padding_idx, bool position_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="position", sizes="position", rows="dy"),
)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, padding, position_padding, backend = args
        y, mean, rstd = _fwd(*inputs, backend)
        ids, positions, types, word, position, type_, weight, _, _, p, seed, site, _ = inputs
        ctx.save_for_backward(
            ids, positions, types, word, position, type_, weight, mean, rstd, seed
        )
        ctx.scalars = (p, site, padding, position_padding, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        *saved, seed = ctx.saved_tensors
        p, site, padding, position_padding, backend = ctx.scalars
        wanted = ctx.needs_input_grad
        dword, dposition, dtype_table, dweight, dbias = _bwd(
            dy.contiguous(), *saved, p, seed, site, padding, position_padding, wanted[4], backend
        )
        ready = saved[3] is None  # ids held the embeddings themselves
        tables = (None if ready else dword, none_if_empty(dposition), none_if_empty(dtype_table))
        return dword if ready else None, None, None, *tables, dweight, dbias, *[None] * 8


def _check_all(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor | None,
    position: Tensor,
    type_: Tensor | None,
    weight: Tensor,
    bias: Tensor,
) -> None:
    _check.given(position=position, weight=weight, bias=bias)
    _check.floating(word=word, position=position, type_=type_, weight=weight, bias=bias)
    _check.shape("position", position, -1, -1)
    T, C = ids.shape[0] if ids.dim() else 0, position.shape[1]
    if word is None:
        _check.floating(ids=ids)
        _check.shape("ids (ready embeddings, since word is None)", ids, T, C)
    else:
        _check.integer(ids=ids)
        _check.shape("ids", ids, T)
        _check.shape("word", word, -1, C)
    _check.integer(positions=positions, types=types)
    _check.shape("positions", positions, T)
    if (types is None) != (type_ is None):
        raise ValueError(
            "types and type_ come together: pass both, or neither for a model without token types"
        )
    _check.shape("types", types, T)
    _check.shape("type_", type_, -1, C)
    _check.shape("weight", weight, C)
    _check.shape("bias", bias, C)
    _check.same_device(
        position=position,
        ids=ids,
        positions=positions,
        types=types,
        word=word,
        weight=weight,
        bias=bias,
    )


@exported_as(eager)
def embed(
    ids: Tensor,  # (T,) int, or (T, C) float with word=None
    positions: Tensor,  # (T,) int
    types: Tensor | None,  # (T,) int
    word: Tensor | None,  # (V, C)
    position: Tensor,  # (P, C)
    type_: Tensor | None,  # (Y, C)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    *,
    eps: float = 1e-12,
    p: float = 0.0,
    seed: Tensor | None = None,  # (1,) int64
    site: int = 0,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[positions] + type_[types])) -> (T, C) in the tables' dtype, or autocast's.

    `position` is a learned table or a sinusoidal buffer, which gets no gradient. The row padding_idx of word, and
    position_padding_idx of position, get none either. Saves the ids, references to the tables and two statistics a row
    for backward; the scatter-add is deterministic. Refuses unequal lengths, integer tables, and on the CPU ids out of
    range (IndexError). Devlin et al. 2018, section 3.
    """
    _check_all(ids, positions, types, word, position, type_, weight, bias)
    _check.dropout(p, site)
    _check.epsilon(eps)
    if word is not None:
        _check.padding("padding_idx", padding_idx, word.shape[0])
    _check.padding("position_padding_idx", position_padding_idx, position.shape[0])
    out_dtype = (ids if word is None else word).dtype
    if out_dtype != torch.float64:
        out_dtype = autocast_dtype(position.device.type) or out_dtype
    seed = seed_for(p, seed, position)
    args = (
        ids,
        positions,
        types,
        word,
        position,
        type_,
        weight,
        bias,
        eps,
        p,
        seed,
        site,
        out_dtype,
    )
    backend = choose("embed", position.device, *args)
    if wants_grad(ids, word, position, type_, weight, bias):
        return record(_Embed, *args, padding_idx, position_padding_idx, backend)
    return _fwd(*args, backend)[0]
