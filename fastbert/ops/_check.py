"""The contract checks at the ops' boundary: metadata is free, values are read only where `checks_values` says so."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import Tensor

from fastbert.files import quoted

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32)


def floating(**tensors: Tensor | None) -> None:
    """Refuse a tensor that is not fp32, bf16, fp16 or fp64."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"{name} is {t.dtype}: pass float32, bfloat16, float16 or float64")


def integer(**tensors: Tensor | None) -> None:
    """Refuse a tensor that is not int64 or int32."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in INTS:
            raise TypeError(f"{name} is {t.dtype}: pass int64 (or int32) indices")


def has_rows(x: Tensor) -> None:
    """Refuse a scalar, or rows without an element, where the op works on the last dimension."""
    if x.dim() == 0:
        raise ValueError("x has no dimension: pass at least one row (C,)")
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must not be 0")


def given(**tensors: Tensor | None) -> None:
    """Refuse None for a tensor that the op can't do without."""
    for name, t in tensors.items():
        if t is None:
            raise TypeError(f"{name} is None: pass a tensor")


def sequences(cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Refuse cu_seqlens of another shape or dtype or without an entry, and a negative max_seqlen."""
    shape("cu_seqlens", cu_seqlens, -1)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}: pass int32")
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens is empty: it holds B + 1 running sums and starts at 0")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen is {max_seqlen}: pass the longest sequence's length")


def epsilon(eps: float) -> None:
    """Refuse a negative or NaN epsilon."""
    if not eps >= 0.0:
        raise ValueError(f"eps is {eps}: it must be at least 0, 1e-12 for instance")


def padding(name: str, index: int | None, size: int) -> None:
    """Refuse a padding row that the table does not have."""
    if index is not None and not 0 <= index < size:
        raise ValueError(
            f"{name} is {index}, outside [0, {size}): name a row of the table, or None"
        )


def shape(name: str, t: Tensor | None, *expected: int) -> None:
    """Refuse a tensor of another shape; -1 matches any size."""
    if t is None or t.shape == expected:
        return
    fits = t.dim() == len(expected)
    for i, size in enumerate(expected):
        fits = fits and (size == -1 or size == t.shape[i])
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}, expected {tuple(expected)} (-1 is any size)"
        )


def same_device(**tensors: Tensor | None) -> None:
    """Refuse tensors that live on different devices."""
    first, device = "", None
    for name, t in tensors.items():
        if t is None:
            continue
        if device is None:
            first, device = name, t.device
        elif t.device != device:
            raise ValueError(
                f"{name} is on {t.device} but {first} is on {device}: move one of them"
            )


def dropout(p: float, site: int) -> None:
    """Refuse a dropout probability outside [0, 1) and a site that is no 32-bit counter."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability p is {p}: it must be in [0, 1)")
    if not 0 <= site < 2**32:
        raise ValueError(f"site is {site}: it must be in [0, 2**32)")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an option outside its list."""
    if value not in allowed:
        raise ValueError(f"{name} is {quoted(value)}: choose one of {', '.join(allowed)}")


# --- values: called in the op's body only ---


def ids_in_range(name: str, ids: Tensor, size: int, remedy: str) -> None:
    """Refuse ids outside [0, size)."""
    if ids.numel() and not _inside(ids, size):
        low, high = (int(v) for v in torch.aminmax(ids))
        bad = low if low < 0 else high
        where = int((ids.reshape(-1) == bad).nonzero()[0])
        raise IndexError(f"{name}[{where}] is {bad}, outside [0, {size}): {remedy}")


def word_ids(ids: Tensor, size: int) -> None:
    """Refuse ids that a table of `size` words does not have."""
    ids_in_range("ids", ids, size, "check that the tokenizer belongs to the model (vocab_size)")


def _inside(ids: Tensor, size: int) -> bool:
    low, high = torch.aminmax(ids)
    return low.item() >= 0 and high.item() < size


def labels_in_range(labels: Tensor, size: int, ignore_index: int) -> None:
    """Refuse labels outside [0, size) that are not ignore_index."""
    # most callers have picked the labelled rows already
    if labels.numel() and not _inside(labels, size):
        ids_in_range(
            "labels (without ignored ones)",
            labels[labels != ignore_index],
            size,
            f"pass class ids, or {ignore_index} for no label",
        )


def cu_seqlens_valid(cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> None:
    """Refuse cu_seqlens that do not start at 0, decrease, run past the tokens, or hold a sequence over max_seqlen."""
    bounds = cu_seqlens.tolist()
    # every layer checks every batch: the walk that finds the culprit waits until there is one
    lengths = list(map(operator.sub, bounds[1:], bounds))
    if (
        bounds[0] == 0
        and bounds[-1] <= tokens
        and (not lengths or (min(lengths) >= 0 and max(lengths) <= max_seqlen))
    ):
        return
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens starts at {bounds[0]}: its first entry must be 0")
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(
                f"cu_seqlens falls from {start} to {end} at entry {i + 1}: pass running sums of the lengths"
            )
        if end - start > max_seqlen:
            raise ValueError(
                f"sequence {i} has {end - start} tokens but max_seqlen is {max_seqlen}: pass the longest length"
            )
    if bounds[-1] > tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]} but there are {tokens} tokens")
