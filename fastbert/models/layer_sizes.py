"""Layers with sizes of their own: made from layers of one size, and filled up with zeros to layers of one size."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.models.config import BertConfig
from fastbert.nn.watch import log_once

State = dict[str, Tensor]

_MATRIX = re.compile(r"layers\.(\d+)\.(attention|feed_forward)\.(qkv|out|up|down)\.(weight|bias)$")


def full_size(config: BertConfig) -> BertConfig:
    """The configuration with layers of one size, the same where they have one already."""
    return dataclasses.replace(config, layer_heads=None, layer_widths=None)


def note_sizes(config: BertConfig) -> None:
    """Log that transformers can't load the model, if its layers have sizes of their own or another family's form."""
    if config.is_mixed:
        log_once(
            f"transformers has no {config.model_type} of this form and can't load the saved model, from_pretrained can"
        )
    if config != full_size(config):
        log_once(
            "transformers has no field for sizes of single layers and can't load the saved model, from_pretrained can: "
            "save_pretrained(..., padded=True) fills the layers up with zeros for transformers"
        )


def pad(values: State, config: BertConfig) -> State:
    """A model's state dict in layers of one size.

    Heads and columns that are added have weights and biases of 0, and add 0 to their block. Raises ValueError for int8
    weights.
    """
    if config.int8_bits is not None:
        raise ValueError(
            "the weights are int8, which are not padded: pad the floating-point model and quantise it afterwards"
        )
    sizes = {"attention": config.hidden_size, "feed_forward": config.intermediate_size}

    def change(layer: int, block: str, piece: Tensor, dim: int) -> Tensor:
        more = sizes[block] - piece.shape[dim]
        # tnf.pad counts dimensions from the last one
        return tnf.pad(piece, (0, 0) * (piece.dim() - 1 - dim) + (0, more))

    return _changed(values, change)


def take(
    values: State,
    heads: Sequence[Tensor],  # int64 numbers of the heads that each layer keeps
    columns: Sequence[Tensor],  # and of its feed-forward columns
    config: BertConfig,
) -> tuple[State, BertConfig]:
    """A model's state dict with these heads and columns alone, and the configuration that fits it."""
    inside = torch.arange(config.head_size)
    rows = [(h[:, None] * config.head_size + inside).flatten() for h in heads]
    kept = {"attention": rows, "feed_forward": columns}

    def change(layer: int, block: str, piece: Tensor, dim: int) -> Tensor:
        return piece.index_select(dim, kept[block][layer].to(piece.device))

    sizes = tuple(map(len, heads)), tuple(map(len, columns))
    smaller = dataclasses.replace(config, layer_heads=sizes[0], layer_widths=sizes[1])
    return _changed(values, change), smaller


def _changed(values: State, change: Callable[[int, str, Tensor, int], Tensor]) -> State:
    """`change` along the inner dimension of every block: rows of qkv and up, columns of out and down."""
    found = dict(values)
    for key, value in values.items():
        if (match := _MATRIX.search(key)) is None:
            continue
        layer, block, part, leaf = match.groups()
        if part in ("qkv", "up"):
            pieces = value.chunk(3) if part == "qkv" else (value,)
            found[key] = torch.cat([change(int(layer), block, piece, 0) for piece in pieces])
        elif leaf == "weight":
            found[key] = change(int(layer), block, value, 1)
    return found
