"""Tables of biases for `attention` that depend on the distance of two tokens: T5's buckets, ALiBi's slopes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.ops import _check


def relative_bias(
    table: Tensor,  # (buckets, H)
    max_seqlen: int,
    *,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> Tensor:
    """T5's biases of relative positions as attention's `bias` (H, 2 max_seqlen - 1), connected to the table's graph.

    Half of the buckets are for later tokens, unless `bidirectional` is False: then earlier ones have all, and later
    ones the bucket of distance 0. Half of a direction's buckets hold one distance each, the others grow
    logarithmically up to `max_distance`; the last holds all beyond. Refuses less than 4 buckets (2 in one direction),
    and a max_distance within the exact buckets. Raffel et al. 2020, section 2.1.
    """
    _check.floating(table=table)
    _check.shape("table", table, -1, -1)
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    exact = buckets // 2
    if exact < 1 or not max_distance > exact:
        raise ValueError(
            f"table has {table.shape[0]} buckets and max_distance is {max_distance}: pass at least "
            f"{4 if bidirectional else 2} buckets, and a max_distance above {max(exact, 1)}"
        )
    size = max(max_seqlen, 1)
    distance = torch.arange(1 - size, size, device=table.device)  # of a key from its query
    back = distance.abs() if bidirectional else (-distance).clamp(min=0)
    growth = (back.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    bucket = torch.where(back < exact, back, far)
    if bidirectional:
        bucket = bucket + buckets * (distance > 0)
    # a product in place of an index: its backward has one order of sums
    return (tnf.one_hot(bucket, table.shape[0]).to(table.dtype) @ table).t()


def alibi_bias(slopes: Tensor, max_seqlen: int) -> Tensor:
    """-slopes[h] |j - i| as attention's `bias` (H, 2 max_seqlen - 1), for slopes (H,). Press et al. 2022."""
    _check.floating(slopes=slopes)
    _check.shape("slopes", slopes, -1)
    size = max(max_seqlen, 1)
    distance = torch.arange(1 - size, size, device=slopes.device).abs()
    return -slopes[:, None] * distance
