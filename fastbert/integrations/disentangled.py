"""DeBERTa's attention on packed tokens, by stock ops.

The score of query i and key j is (q_i . k_j + q_i . key(i - j) + k_j . query(i - j)) * scale, where key and query are
projections of a table of relative positions. Sequences of like lengths are computed together, so that little of a
padded batch is left. docs/accelerate.md has the costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert import functional as F
from fastbert.integrations.families import Family, Parts
from fastbert.integrations.recognise import RECORDERS, SHARDING, dropout_like, linear_like, plain
from fastbert.nn.layer import LayerSettings, LayerWeights, project
from fastbert.nn.packing import Packing
from fastbert.nn.watch import first_hooked

# a group's shortest sequence has this share of the tokens of its longest, and its scores of one head are at most so
# many
SHARE, SCORES = 0.75, 1 << 17


# the projections of positions to keys and to queries: DeBERTa-v2's names and DeBERTa's
_KEYS, _QUERIES = ("pos_key_proj", "pos_proj"), ("pos_query_proj", "pos_q_proj")


class Groups(NamedTuple):
    """Packed tokens (T, ...) as padded batches (n, L, ...) of sequences of like lengths, one behind the other."""

    rows: Tensor  # (P,) int64: the packed row at every place
    places: Tensor  # (T,) int64: the place of every packed row
    shapes: tuple[tuple[int, int], ...]  # (n, L) of every group
    seen: tuple[Tensor | None, ...]  # bool (n, L), True at tokens; None: the group has no padding


class Relative(NamedTuple):
    """What the layers of one forward read of relative positions."""

    table: Tensor  # (R, C), the rows of the stack's table that the batch needs
    rows: Tensor  # (2 S - 1,) int64: the row of each distance i - j from 1 - S to S - 1
    groups: Groups


def terms(core: Any) -> tuple[str, ...]:
    """The terms of scores with positions that a layer's attention has: of content and position, and the reverse."""
    if not core.relative_attention:
        return ()
    return tuple(t for t in ("c2p", "p2c") if t in core.pos_att_type)


def by_head(core: Any) -> bool:
    """Whether the attention is the first DeBERTa's: one projection gives q, k and v of head after head."""
    return "q_bias" in core._parameters


def scale(core: Any, size: int) -> float:
    """The scale of scores with heads of this size."""
    kinds = core.pos_att_type
    # the first DeBERTa also counts kinds that it does not know
    known = len(kinds) if by_head(core) else ("c2p" in kinds) + ("p2c" in kinds)
    return (size * (1 + known)) ** -0.5


def why_not(core: Any) -> str | None:
    """Why a layer's attention can't be computed here, None if it can."""
    if getattr(core, "talking_head", False):
        return "its attention has talking heads"
    names = ("pos_dropout", *_KEYS, *_QUERIES)
    named = {name: m for name in names if (m := core._modules.get(name)) is not None}
    for name, m in named.items():
        if not (dropout_like(m) if name == "pos_dropout" else linear_like(m)):
            return f"its {name} is {str(m).splitlines()[0]}"
    if (seen := first_hooked(named.values(), *RECORDERS, SHARDING)) is not None:
        return f"hooks are attached to its {next(n for n, m in named.items() if m is seen)}"
    return None


# --- once in a forward ---


def relative(family: Family, model: Any, packing: Packing) -> Relative | None:
    """Positions and groups for a batch, None where the model's attention has no terms of positions."""
    if not (family.disentangled and family.reads_distances(model)):
        return None
    stack, tokens = family.stack_of(model), packing.tokens
    table = stack.get_rel_embedding()
    S, span = packing.max_seqlen, table.shape[0] // 2
    # transformers' own function of the distances 0 to S - 1; it reads shapes and devices
    queries = table.new_empty(1).expand(S, 1)
    buckets = stack.get_rel_pos(queries[:1], queries).flatten()
    rows = (torch.cat([-buckets[1:].flip(0), buckets]) + span).clamp(0, 2 * span - 1)
    if tokens == 0:
        none = rows[:0]
        return Relative(table, rows, Groups(none, none, (), ()))
    if not _lengths_known(packing):
        return Relative(table, rows, _one_group(packing, tokens))
    first, last = torch.stack(rows.aminmax()).tolist()
    return Relative(table[first : last + 1], rows - first, _groups(packing, tokens))


def _lengths_known(packing: Packing) -> bool:
    """Whether lengths are read without a host sync or another graph."""
    return packing.cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()


def _places(starts: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed rows (n, L) of sequences, and booleans (n, L), True at tokens; padding repeats a row."""
    column = torch.arange(longest, device=starts.device)
    seen = column < lengths[:, None]
    return torch.where(seen, starts[:, None] + column, starts[:, None]), seen


def _groups(packing: Packing, tokens: int) -> Groups:
    starts, lengths = packing.cu_seqlens[:-1].long(), packing.cu_seqlens.diff().long()
    sizes, order = lengths.sort(descending=True, stable=True)
    bounds, ordered = [0], sizes.tolist()
    for i, length in enumerate(ordered):
        longest, count = ordered[bounds[-1]], i - bounds[-1] + 1
        if length < SHARE * longest or (count > 1 and count * longest**2 > SCORES):
            bounds.append(i)
    rows, seen, shapes = [], [], []
    for first, end in zip(bounds, (*bounds[1:], len(ordered)), strict=True):
        longest = ordered[first]
        if longest == 0:
            break
        row, token = _places(starts[order[first:end]], sizes[first:end], longest)
        rows.append(row.flatten())
        shapes.append((end - first, longest))
        seen.append(None if ordered[end - 1] == longest else token)
    found = [
        torch.ones(n * L, dtype=torch.bool) if t is None else t.flatten()
        for (n, L), t in zip(shapes, seen, strict=True)
    ]
    every, token = torch.cat(rows), torch.cat(found)
    places = every.new_empty(tokens)
    places[every[token]] = token.nonzero().squeeze(1)
    return Groups(every, places, tuple(shapes), tuple(seen))


def _one_group(packing: Packing, tokens: int) -> Groups:
    """The whole batch as one group, where no size may depend on a length."""
    cu_seqlens, longest = packing.cu_seqlens.long(), packing.max_seqlen
    rows, seen = _places(cu_seqlens[:-1], cu_seqlens.diff(), longest)
    # an empty sequence at the end starts behind the last row
    rows = rows.clamp(max=tokens - 1).flatten()
    row = torch.arange(tokens, device=rows.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    places = sequence * longest + row - cu_seqlens[sequence]
    return Groups(rows, places, ((packing.batch, longest),), (seen,))


# --- in every layer ---


def heads_of(y: Tensor, core: Any) -> Tensor:
    """The output y (T, H 3 D) of the first DeBERTa's one projection as (T, 3, H, D), plus q_bias and v_bias."""
    q, v = core.q_bias, core.v_bias
    biases = torch.stack([q, torch.zeros_like(q), v]).unflatten(1, (-1, core.attention_head_size))
    return y.unflatten(1, (*biases.shape[1:2], 3, biases.shape[2])).transpose(1, 2) + biases


def attention(
    m: Parts, w: LayerWeights, s: LayerSettings, r: Relative, picked: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The layer's attention with its output projection: x (T, C) -> (T, C), or (R, C) at the rows `picked`."""

    def block(x: Tensor) -> Tensor:
        qkv = w.qkv(x) if callable(w.qkv) else F.qkv_proj(x, w.qkv, w.qkv_bias, s.heads)
        assert s.scale is not None
        keys, queries = _positions(m, r, qkv.shape[-1])
        if queries is not None:
            queries = queries * s.scale
        groups, ys = r.groups, [qkv[:0, 2]]
        parts = qkv.index_select(0, groups.rows).split([n * L for n, L in groups.shapes])
        for part, shape, seen in zip(parts, groups.shapes, groups.seen, strict=True):
            y = _attend(part.unflatten(0, shape), keys, queries, seen, s.scale, s.rates.attention)
            ys.append(y.flatten(0, 1))
        places = groups.places if picked is None else groups.places.index_select(0, picked)
        return project(torch.cat(ys).index_select(0, places).flatten(1), w.out, w.out_bias)

    return block


def _positions(m: Parts, r: Relative, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Keys of the distances S - 1 to 1 - S and queries of 1 - S to S - 1, (H, 2 S - 1, D) each; None: no such term."""
    core, known = m.core, terms(m.core)
    table = core.pos_dropout(r.table)
    keys = queries = None
    shared = getattr(core, "share_att_key", False)
    if "c2p" in known:
        keys = _heads(m.key if shared else _first(core, _KEYS), table, size)
        keys = keys.index_select(1, r.rows.flip(0))
    if "p2c" in known:
        queries = _heads(m.query if shared else _first(core, _QUERIES), table, size)
        queries = queries.index_select(1, r.rows)
    return keys, queries


def _first(core: Any, names: tuple[str, ...]) -> Any:
    return next(core._modules[name] for name in names if name in core._modules)


def _heads(m: Any, table: Tensor, size: int) -> Tensor:
    """The table's rows through a projection: (H, R, D)."""
    own = plain(m)
    y = m(table[None])[0] if own is None else F.linear(table, *own)
    return y.unflatten(1, (-1, size)).transpose(0, 1)


def _attend(
    qkv: Tensor,  # (n, L, 3, H, D)
    keys: Tensor | None,  # (H, 2 S - 1, D), of distances from S - 1 down
    queries: Tensor | None,  # (H, 2 S - 1, D), scaled, of distances from 1 - S up
    seen: Tensor | None,  # (n, L) bool, True at tokens
    scale: float,
    p: float,
) -> Tensor:
    """Attention of a group's sequences (n, L, H, D); `p` is dropout's, with torch's own bits."""
    n, L = qkv.shape[:2]
    q, k, v = qkv.permute(2, 3, 0, 1, 4).contiguous().flatten(2, 3).unbind(0)  # (H, n L, D)
    q = q * scale
    found = None
    if keys is not None:
        found = _by_distance(q, keys, n)
    if queries is not None:
        # rows are keys here
        other = _by_distance(k, queries, n).mT
        found = other if found is None else found + other
    assert found is not None
    q, k, v = (t.unflatten(1, (n, L)).flatten(0, 1) for t in (q, k, v))  # (H n, L, D)
    scores = torch.baddbmm(found.flatten(0, 1), q, k.mT)
    if seen is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.unflatten(0, (-1, n)).masked_fill(~seen[:, None], lowest).flatten(0, 1)
    weights = scores.softmax(-1)
    y = (tnf.dropout(weights, p) if p else weights) @ v
    return y.unflatten(0, (-1, n)).permute(1, 2, 0, 3)


def _by_distance(x: Tensor, table: Tensor, n: int) -> Tensor:
    """x (H, n L, D), table (H, 2 S - 1, D) -> (H, n, L, L): row i, column j is x[i] . table[S - 1 - i + j]."""
    L = x.shape[1] // n
    skipped = table.shape[1] // 2 + 1 - L
    y = torch.bmm(x, table[:, skipped : skipped + 2 * L - 1].mT)
    # one step to the left in every further row
    size = (table.shape[0], n, L, L)
    return y.as_strided(size, (y.stride(0), y.stride(1) * L, max(y.stride(1) - 1, 1), 1), L - 1)
