"""A model's arguments, checked and packed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.backend.torch_private import fixed
from fastbert.models.config import BertConfig
from fastbert.nn.packing import Packing


class Inputs(NamedTuple):
    """A batch, packed."""

    ids: Tensor  # (T,) int64, or word embeddings (T, C)
    positions: Tensor  # (T,) int64
    types: Tensor | None  # (T,) int64
    packing: Packing
    labels: Tensor | None  # (T,) int64
    label_rows: Tensor | None  # (R,) int64
    output_hidden_states: bool
    output_attentions: bool


def prepare(
    config: BertConfig,
    input_ids: Tensor | None = None,  # (B, S) int64, or packed (T,)
    attention_mask: Tensor | None = None,  # (B, S), 1 at tokens
    token_type_ids: Tensor | None = None,  # as input_ids
    position_ids: Tensor | None = None,  # as input_ids, or (1, S)
    inputs_embeds: Tensor | None = None,  # (B, S, C) or (T, C), instead of input_ids
    *,
    labels: Tensor | None = None,  # as input_ids
    label_rows: Tensor | None = None,  # (R,) int64, packed row numbers of the labelled tokens
    rows_wanted: bool = False,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32, with packed tokens
    max_seqlen: int | None = None,
    output_hidden_states: bool | None = None,
    output_attentions: bool | None = None,
    return_dict: bool | None = None,
) -> Inputs:
    """Check the arguments and pack the batch; `rows_wanted` also finds the labelled rows (a sync unless given).

    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes or combinations.
    """
    if return_dict is False:
        raise ValueError(
            "return_dict is False: outputs are objects that also index and unpack like tuples"
        )
    if input_ids is not None and inputs_embeds is None:
        tokens = values = input_ids
    elif inputs_embeds is not None and input_ids is None:
        tokens, values = inputs_embeds[..., 0], inputs_embeds
    else:
        raise ValueError("pass one of input_ids and inputs_embeds, not both or neither")
    _check(config, tokens, input_ids, inputs_embeds, token_type_ids, labels)
    packing = _packing(tokens, attention_mask, cu_seqlens, max_seqlen)
    _check_length(config, packing, position_ids)
    if packing.length is None:
        # rows past cu_seqlens[-1] may hold any value: give them valid ids and no label
        tail = packing.tail(tokens.shape[0])
        if input_ids is not None:
            values = tokens = input_ids = input_ids.masked_fill(tail, 0)
        if token_type_ids is not None:
            token_type_ids = token_type_ids.masked_fill(tail, 0)
        if position_ids is not None:
            position_ids = position_ids.masked_fill(tail, 0)
    if labels is not None:
        labels = packing.unpad_labels(labels)
        if rows_wanted:
            label_rows = packing.labelled(labels, label_rows)
    return Inputs(
        packing.unpad(values),
        _positions(config, packing, tokens, input_ids, position_ids),
        None if token_type_ids is None else packing.unpad(token_type_ids),
        packing,
        labels,
        label_rows,
        bool(output_hidden_states),
        bool(output_attentions),
    )


def _check(
    config: BertConfig,
    tokens: Tensor,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    labels: Tensor | None,
) -> None:
    if inputs_embeds is not None and fixed(inputs_embeds.shape[-1]) != (config.hidden_size,):
        raise ValueError(
            f"inputs_embeds has shape {fixed(*inputs_embeds.shape)}: its last dimension must be hidden_size "
            f"{config.hidden_size}"
        )
    shape = fixed(*tokens.shape)
    integers = {"input_ids": input_ids, "token_type_ids": token_type_ids, "labels": labels}
    for name, t in integers.items():
        if t is not None and (t.is_floating_point() or t.dtype == torch.bool):
            raise TypeError(f"{name} is {t.dtype}: pass int64")
        if t is not None and fixed(*t.shape) != shape:
            raise ValueError(f"{name} has shape {fixed(*t.shape)}: pass one per token, {shape}")


def _packing(
    tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> Packing:
    """The packing by the caller's cu_seqlens, by the mask, or of a batch whose columns are all tokens."""
    shape = fixed(*tokens.shape)
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError(
                "attention_mask and cu_seqlens are both set: packed tokens need no mask"
            )
        if tokens.dim() != 1:
            raise ValueError(
                f"cu_seqlens is set but the tokens are {shape}: pass packed tokens (T,)"
            )
        return Packing.given(cu_seqlens, max_seqlen)
    if tokens.dim() != 2:
        raise ValueError(f"the tokens are {shape}: pass (B, S), or packed (T,) with cu_seqlens")
    if mask is None:
        return Packing.full(tokens.shape[0], tokens.shape[1], tokens.device)
    if fixed(*mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {fixed(*mask.shape)}: pass one value per token, {shape}"
        )
    return Packing.from_mask(mask)


def _check_length(config: BertConfig, packing: Packing, position_ids: Tensor | None) -> None:
    # RoBERTa's positions count tokens, the others' are columns of the padded layout
    columns = packing.length is not None and config.model_type != "roberta"
    (longest,) = fixed(
        packing.length if columns and packing.length is not None else packing.max_seqlen
    )
    if position_ids is None and longest > config.max_length:
        raise ValueError(
            f"the batch is {longest} tokens long but the model has {config.max_length} positions: truncate it"
        )


def _positions(
    config: BertConfig,
    packing: Packing,
    tokens: Tensor,
    input_ids: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """(T,) rows of the position table, as in transformers: columns, or RoBERTa's count of unpadded ids."""
    if position_ids is not None:
        if config.rotary:
            raise ValueError(
                "position_ids are given and the model has rotary positions, which count the tokens: leave them out"
            )
        shape = fixed(*tokens.shape)
        if position_ids.dim() != len(shape) or fixed(position_ids.shape[-1]) != shape[-1:]:
            raise ValueError(
                f"position_ids has shape {fixed(*position_ids.shape)}: pass one per token, {shape}"
            )
        return packing.unpad(position_ids.expand(tokens.shape))
    if config.model_type == "roberta" and input_ids is not None and packing.length is not None:
        pad = config.pad_token_id or 0
        token = (input_ids != pad).long()
        return packing.unpad(token.cumsum(1) * token + pad)
    positions = packing.positions(tokens.shape[0])
    return positions + config.position_offset if config.position_offset else positions
