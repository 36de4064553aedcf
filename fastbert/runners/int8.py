"""Int8 copies of weights. Each row has one scale. A column of outliers is the sum of several int8 columns."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backend import cpu
from fastbert.backend.reference.linear_int8 import LARGEST_WEIGHT, most_columns, quantize_weight

# extra columns: at most this share of the weight's own. The first of them must lower the error to _GAIN of what it is
# without them, and twice as many to _MORE of what it is with them
_MOST, _GAIN, _MORE = 1 / 32, 0.8, 0.95


def split(
    weight: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 (N, K + E), the scale of each row (N,) fp32, and the columns (E,) int32 that the last E columns repeat.

    The largest number of a row sets its scale. Trained feed-forward weights have a few columns with numbers several
    times as large as the rest, which make the steps of all others coarse. The scale is taken without such columns; each
    of them is the sum of as many columns of int8 as its numbers need, and its activation is multiplied by all of them.
    The number of such columns is chosen by the weight's rounding error. Sums stay exact.
    """
    w = weight.detach().float()
    q, scale = quantize_weight(w)
    best = q, scale, torch.empty(0, dtype=torch.int32)
    wanted = _GAIN * _error(w, *best)
    most = int(w.shape[1] * _MOST)
    # columns by their largest number, in units of their row's spread
    spread = w.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    order = (w / spread).abs().amax(0).argsort(descending=True)
    count = 1
    while count <= most:
        found = _without(w, order[:count], most)
        if found is not None and (smaller := _error(w, *found)) <= wanted:
            best, wanted = found, _MORE * smaller
        count *= 2
    return best


def _without(w: Tensor, columns: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """`split` with scales from all columns but these.

    None where a row has zeros in all others, and where more than `most` columns would be added.
    """
    kept = torch.ones(w.shape[1], dtype=torch.bool)
    kept[columns] = False
    scale = w[:, kept].abs().amax(1) / LARGEST_WEIGHT
    if not bool((scale > 0).all()):
        return None
    left = torch.round(w / scale[:, None])
    parts, sources = [left.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)], []
    left = left[:, columns] - parts[0][:, columns]
    while bool(left.any()):
        wide = left.any(0)
        columns, left = columns[wide], left[:, wide]
        parts.append(left.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT))
        sources.append(columns)
        left = left - parts[-1]
        if sum(s.numel() for s in sources) > most:
            return None
    repeated = torch.cat(sources) if sources else columns[:0]
    return torch.cat(parts, 1).to(torch.int8), scale, repeated.to(torch.int32)


def _error(w: Tensor, q: Tensor, scale: Tensor, sources: Tensor) -> float:
    """The root mean square of the weight's rounding."""
    K = w.shape[1]
    whole = q[:, :K].float().index_add(1, sources.long(), q[:, K:].float())
    return float((whole * scale[:, None] - w).square().mean().sqrt())


def pack(weight: Tensor) -> Tensor:
    """A weight (N, K) as int8 in the GEMM's own order, with its scales: csrc/cpu/linear_int8.h."""
    q, scale, sources = split(weight)
    (N, K), extra = weight.shape, sources.numel()
    size = cpu.native.linear_int8_packed_size(N, K, extra)
    packed = cpu.fresh(q, size, dtype=torch.uint8)
    cpu.native.linear_int8_pack(
        q.data_ptr(),
        scale.data_ptr(),
        cpu.address(sources),
        packed.data_ptr(),
        N,
        K,
        extra,
        torch.get_num_threads(),
    )
    return packed


def why_not_exact(columns: int, bits: int) -> str | None:
    """Why a weight of so many columns can't be multiplied exactly, None if it can."""
    most = int(most_columns(bits) / (1 + _MOST))
    if columns <= most:
        return None
    return f"a weight has {columns} columns, and {bits} bits allow {most} for exact sums"
