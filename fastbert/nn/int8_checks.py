"""Why tensors can't be an int8 module's, or become it: each function returns a sentence or the end of one, or None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.reference.linear_int8 import LARGEST_WEIGHT, most_columns

# extra columns of a weight: at most this share of its own
MOST = 1 / 32
# the tensors of an int8 module, and their dtypes
DTYPES = {"sources": torch.int32, "weight": torch.int8, "scale": torch.float32}


def why_not_numbers(weight: Tensor | None) -> str | None:
    """Why a floating-point weight can't be quantised; the end of a sentence."""
    if weight is None:
        return "has no weight"
    if weight.is_meta:
        return "is on the meta device, which holds no numbers: load the weights first"
    if not bool(weight.isfinite().all()):
        return "has a number that is not finite: quantise weights without inf and NaN"
    return None


def why_not_integers(weight: Tensor, bits: int) -> str | None:
    """Why sums with these integers, extra columns included, could leave int32; the end of a sentence."""
    if weight.numel() and int(weight.amin()) < -LARGEST_WEIGHT:
        return f"has the integer -128, and the least is -{LARGEST_WEIGHT}"
    if (columns := weight.shape[1]) > (most := most_columns(bits)):
        return f"has {columns} columns, and {bits} bits allow {most}"
    return None


def why_not_sources(sources: Tensor, columns: int) -> str | None:
    """Why a weight of so many columns can't repeat these columns; the end of a sentence."""
    outside = bool(((sources < 0) | (sources >= columns)).any())
    return f"names a column outside [0, {columns})" if outside else None


def why_not_exact(columns: int, bits: int) -> str | None:
    """Why a weight of so many columns can't be multiplied exactly; the end of a sentence."""
    most = int(most_columns(bits) / (1 + MOST))
    if columns <= most:
        return None
    return f"a weight has {columns} columns, and {bits} bits allow {most} for exact sums"


def why_not_part(m: Any, leaf: str, t: Any, count: int = 1, extra: int = 0) -> str | None:
    """Why `t` can't be one of `count` parts of an int8 module's tensor; its weight has `extra` more columns."""
    N, K = m.shape
    if not isinstance(t, Tensor):
        return f"is a {type(t).__name__} and not a tensor"
    if t.dtype != DTYPES[leaf]:
        return f"is {t.dtype} and not {DTYPES[leaf]}"
    shapes = {"weight": (N // count, K + extra), "scale": (N // count,), "sources": (t.numel(),)}
    if t.shape != shapes[leaf]:
        return f"has shape {tuple(t.shape)} and not {shapes[leaf]}"
    if t.is_meta:
        return "is on the meta device, which holds no numbers"
    if leaf == "weight":
        return why_not_integers(t, m.bits)
    if leaf == "scale" and not bool((t.isfinite() & (t >= 0)).all()):
        return "has a number that is negative or not finite"
    return why_not_sources(t, K) if leaf == "sources" else None


def why_not_state(m: Any, state: Mapping[str, Any], prefix: str) -> str | None:
    """Why a state dict's tensors under this prefix can't be the int8 module's, a sentence.

    They can where all of them fit, and where there is none.
    """
    found = {leaf: state[prefix + leaf] for leaf in m.leaves if prefix + leaf in state}
    weight = found.get("weight")
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return (
            f"{prefix}weight is {weight.dtype} in the state dict and int8 in the model: load it into a floating-point "
            "model, then call fastbert.quantize(model, replace=True)"
        )
    if found and (absent := [leaf for leaf in m.leaves if leaf not in found]):
        return f"the state dict lacks {prefix}{absent[0]}: save the int8 model's state_dict() again"
    sources = found.get("sources")
    extra = sources.numel() if isinstance(sources, Tensor) else 0
    for leaf, t in found.items():
        if reason := why_not_part(m, leaf, t, extra=extra):
            return f"{prefix}{leaf} in the state dict {reason}: load the state of an int8 model of this architecture"
    return None
