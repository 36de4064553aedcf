"""What each layer's attention reads beside its weights: windows, rotary positions, relative positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.files import quoted
from fastbert.functional import Rotary, relative_bias
from fastbert.integrations.families import Family
from fastbert.nn.packing import Packing
from fastbert.runners.forms import Form

# rates that transformers makes anew by the length of a batch
_CHANGING = ("dynamic", "longrope")


def why_not(family: Family, model: Any, given: dict[str, Any]) -> str | None:
    """Why the model's positions can't be read here, None if they can; reads no tensor's values."""
    if family.rotary:
        holder = getattr(model, family.rotary, None)
        kind = getattr(model, "position_embedding_type", "rotary")
        if holder is None and kind != "absolute":
            return f"its position_embedding_type is {quoted(kind)}"
        kinds = getattr(holder, "rope_type", None) or {}
        for rope in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if rope in _CHANGING:
                return f"its rope_type is {quoted(rope)}, whose rates change with the length"
    if (steps := getattr(model, "z_steps", 0)) > 1:
        return f"its z_steps is {steps}, which runs the last layer again"
    if family.reads_distances(model) and given.get("position_ids") is not None:
        return "position_ids are given, and attention reads the distances of tokens"
    return None


def forms(
    family: Family, model: Any, stacked: Sequence[nn.Module], parts: Sequence[Any], packing: Packing
) -> tuple[Form, ...]:
    """One form per layer; none where attention reads its weights alone."""
    if type(model).__name__ in family.causal:
        return (Form(window=(-1, 0)),) * len(stacked)
    if not (family.rotary or family.bias):
        return ()
    length = packing.max_seqlen
    tables: dict[Any, Rotary | None] = {}
    bias = _bias(family, model, length)
    found = []
    for layer, m in zip(stacked, parts, strict=True):
        kind = getattr(layer, "attention_type", None)
        if kind not in tables:
            tables[kind] = _rotary(family, model, kind, length)
        # transformers counts the token itself
        window = getattr(m.core, "sliding_window", None)
        side = None if window is None else (window - 1, window - 1)
        found.append(Form(side, tables[kind], bias))
    return tuple(found)


def _rotary(family: Family, model: Any, kind: str | None, length: int) -> Rotary | None:
    """The table of one kind of layer ("full_attention"), or of all; None for a model without rotary positions."""
    holder = getattr(model, family.rotary, None) if family.rotary else None
    if holder is None:
        return None
    prefix = "" if kind is None else f"{kind}_"
    rates = getattr(holder, f"{prefix}inv_freq")
    factor = getattr(holder, f"{prefix}attention_scaling", 1.0)
    return Rotary.of_rates(rates, length, factor=factor)


def _bias(family: Family, model: Any, length: int) -> Tensor | None:
    if not family.bias:
        return None
    table = getattr(family.stack_of(model), family.bias)
    return relative_bias(
        table(torch.arange(table.num_embeddings, device=table.weight.device)), length
    )
