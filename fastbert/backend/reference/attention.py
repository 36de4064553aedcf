"""attention: softmax(scale Q K^T + bias) V inside each packed sequence, with dropout (Vaswani et al. 2017)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.reference import philox
from fastbert.backend.reference.attention_form import (
    Rotary,
    biases,
    bounds,
    diagonal_sums,
    hidden_keys,
    rotate,
    sizes,
    split,
)
from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, nbytes


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


class _Sequence:
    """One sequence's heads, and its weights before dropout."""

    def __init__(
        self,
        qkv: Tensor,  # (L, 3, H, D), wide
        kv_heads: int,
        scale: float,
        left: int,
        right: int,
        rotary: Tensor | None,
        pairs: bool,
        bias: Tensor | None,
    ) -> None:
        parts = [t.transpose(0, 1) for t in split(qkv, kv_heads)]  # each (heads, L, D)
        self.group = parts[0].shape[0] // kv_heads
        self.L = parts[0].shape[1]
        if rotary is not None:
            parts[:2] = (rotate(t, rotary, pairs) for t in parts[:2])
        self.q = parts[0]
        self.k, self.v = (t.repeat_interleave(self.group, 0) for t in parts[1:])
        scores = scale * self.q @ self.k.mT
        if bias is not None:
            scores = scores + biases(bias.to(scores.dtype), self.L)
        places = torch.arange(self.L, device=qkv.device)
        if (hidden := hidden_keys(places, places, left, right)) is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        self.scores = scores

    def joined(
        self, dq: Tensor, dk: Tensor, dv: Tensor, rotary: Tensor | None, pairs: bool
    ) -> Tensor:
        """Gradients (H, L, D) of the rotated, repeated heads as that of qkv (L, H + 2 kv_heads, D)."""
        dk, dv = (t.unflatten(0, (-1, self.group)).sum(1) for t in (dk, dv))
        if rotary is not None:
            dq, dk = (rotate(t, rotary, pairs, back=True) for t in (dq, dk))
        return torch.cat([dq, dk, dv]).transpose(0, 1)


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """(b, start, end) of every sequence that has a token."""
    bounds = cu_seqlens.tolist()
    pairs = enumerate(itertools.pairwise(bounds))
    return [(b, start, end) for b, (start, end) in pairs if end > start]


def _factor(
    seed: Tensor | None, site: int, b: int, H: int, L: int, p: float, like: Tensor
) -> Tensor:
    """Dropout's factor of the weights (H, L, L) of sequence b: 0 or 1 / (1 - p)."""
    if p == 0.0 or seed is None:
        return torch.ones((), dtype=like.dtype, device=like.device)
    bh = b * H + torch.arange(H, device=like.device)
    return philox.attention_keep_mask(seed, site, bh, L, L, p).to(like.dtype) / (1.0 - p)


def forward(
    qkv: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,  # (P, 2, R / 2)
    pairs: bool,
    bias: Tensor | None,  # (H, 2 P - 1)
    save: bool,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in qkv's dtype and lse (H, T) fp32, empty without `save`; zeros past cu_seqlens[-1]."""
    T, (H, _, D) = qkv.shape[0], sizes(qkv, kv_heads)
    (wide,) = widen(qkv)
    outs, lses, done = [], [], 0
    for b, start, end in _spans(cu_seqlens):
        s = _Sequence(wide[start:end], kv_heads, scale, left, right, rotary, pairs, bias)
        lse = s.scores.logsumexp(-1)
        P = torch.exp(s.scores - lse[..., None])
        outs.append(((P * _factor(seed, site, b, H, s.L, p, P)) @ s.v).transpose(0, 1))
        lses.append(lse)
        done = end
    # the part without rows connects a result without tokens to the graph
    outs += [split(wide[:0], kv_heads)[0], wide.new_zeros(T - done, H, D)]
    lses.append(wide.new_zeros(H, T - done))
    lse = torch.cat(lses, 1) if save else wide.new_empty(H, 0)
    return torch.cat(outs).to(qkv.dtype), lse


def backward(
    dout: Tensor,  # (T, H, D)
    qkv: Tensor,  # (T, 3, H, D) or (T, H + 2 kv_heads, D)
    out: Tensor,  # (T, H, D)
    lse: Tensor,  # (H, T)
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    left: int,
    right: int,
    kv_heads: int,
    rotary: Tensor | None,
    pairs: bool,
    bias: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dqkv like qkv, zeros past cu_seqlens[-1], and dbias like bias, or empty.

    With P the weights, M dropout's factor and delta = rowsum(dout * out):
        dV = (P M)^T dout,  dS = P (M dout V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q
        dbias[j - i] = the sum of dS[i, j]
    """
    H, _, _ = sizes(qkv, kv_heads)
    wide, g, o = widen(qkv, dout, out)
    dqkv = torch.zeros_like(wide)
    dbias = wide.new_zeros(0) if bias is None or not needs_bias else wide.new_zeros(bias.shape)
    for b, start, end in _spans(cu_seqlens):
        s = _Sequence(wide[start:end], kv_heads, scale, left, right, rotary, pairs, bias)
        do = g[start:end].transpose(0, 1)
        P = s.scores.softmax(-1)
        M = _factor(seed, site, b, H, s.L, p, P)
        delta = (do * o[start:end].transpose(0, 1)).sum(-1, keepdim=True)
        dS = P * (M * (do @ s.v.mT) - delta)
        grads = (scale * dS @ s.k, scale * dS.mT @ s.q, (P * M).mT @ do)
        dqkv[start:end] = s.joined(*grads, rotary, pairs).view_as(dqkv[start:end])
        if dbias.numel():
            dbias += diagonal_sums(dS, dbias.shape[1])
    return dqkv.to(qkv.dtype), dbias if bias is None else dbias.to(bias.dtype)


def eager(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    kv_heads: int | None = None,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    site: int = 0,
    return_lse: bool = False,
) -> Tensor:
    """Stock ops in the tested dtype, one sequence at a time."""
    kv_heads = qkv.shape[2] if kv_heads is None else kv_heads
    H, _, D = sizes(qkv, kv_heads)
    scale = D**-0.5 if scale is None else scale
    left, right = bounds(window, causal)
    table, pairs = (None, False) if rotary is None else (rotary.table, rotary.pairs)
    outs, done = [], 0
    for b, start, end in _spans(cu_seqlens):
        s = _Sequence(qkv[start:end], kv_heads, scale, left, right, table, pairs, bias)
        P = s.scores.softmax(-1)
        outs.append(((P * _factor(seed, site, b, H, s.L, p, P)) @ s.v).transpose(0, 1))
        done = end
    none, _, _ = split(qkv[:0], kv_heads)
    return torch.cat([*outs, none, qkv.new_zeros(qkv.shape[0] - done, H, D)])


def _call(draw: Draw, lengths: tuple[int, ...], H: int, D: int, **options: Any) -> dict:
    """The arguments of a call; rows of the `tail` are NaN, `p` adds a seed and a site."""
    tail, p, kv = (options.pop(name, None) for name in ("tail", "p", "kv_heads"))
    qkv = draw.normal(sum(lengths) + (tail or 0), *((3, H) if kv is None else (H + 2 * kv,)), D)
    if tail:
        qkv[sum(lengths) :] = float("nan")
    kwargs = {
        "qkv": qkv,
        "cu_seqlens": draw.cu_seqlens(*lengths),
        "max_seqlen": max(lengths, default=0),
    }
    kwargs |= options | ({} if kv is None else {"kv_heads": kv})
    return kwargs | ({"p": p, "seed": draw.seed(), "site": 1} if p else {})


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.attention`."""
    call = partial(_call, Draw(dtype, device, seed))
    yield Sample("S1-H1-D1", call((1,), 1, 1), "one token")
    yield Sample("S5-3-1-H2-D3", call((5, 3, 1), 2, 3), "odd head size")
    yield Sample("S5-3-H2-D4-drop", call((5, 3), 2, 4, p=0.25), "dropout")
    yield Sample("S7-2-H2-D4-causal", call((7, 2), 2, 4, causal=True), "causal")
    yield Sample("S33-17-H3-D64-drop", call((33, 17), 3, 64, p=0.1), "BERT's head size")
    yield Sample("S4-0-3-H2-D8", call((4, 0, 3), 2, 8), "an empty sequence")
    yield Sample(
        "tail", call((3, 2), 2, 8, tail=3, p=0.5), "rows past the end: never read, zeros out"
    )
    yield Sample("scale", call((6, 6), 2, 8, scale=0.5), "a scale of one's own")
    yield Sample("S130-H1-D80", call((130,), 1, 80), "longer than a tile, D not a power of two")
    yield Sample("empty", call((), 2, 8), "no token")
    yield Sample(
        "S129-7-H1-D8-drop", call((129, 7), 1, 8, p=0.1), "longer than one tile of keys, by one"
    )
    yield from _modern_samples(Draw(dtype, device, seed + 1), device)


def _modern_samples(draw: Draw, device: str | torch.device) -> Iterator[Sample]:
    """Windows, shared key heads, rotary positions, biases of relative positions."""
    call, turned = partial(_call, draw), partial(Rotary.of, theta=100.0, device=device)

    def table(H: int, positions: int) -> Tensor:
        return draw.normal(H, 2 * positions - 1)

    window = call((133, 9), 2, 8, tail=2, p=0.1, window=(16, 16))
    yield Sample("S133-9-window-drop", window, "a sliding window")
    both = call((70, 3), 1, 16, window=(9, -1), causal=True)
    yield Sample("S70-window-causal", both, "both at once")
    yield Sample("S40-window-right", call((40,), 1, 4, window=(-1, 5)), "a window to one side")
    shared = call((37, 5), 4, 8, kv_heads=2, p=0.2)
    yield Sample("S37-5-H4-kv2", shared, "two queries per key")
    yield Sample("S19-H3-kv1-D256", call((19, 2), 3, 256, kv_heads=1), "one key; the largest D")
    yield Sample("rotary", call((21, 6), 2, 16, rotary=turned(30, 16)), "rotary positions")
    pairs = call((21, 6), 2, 10, rotary=turned(21, 6, pairs=True))
    yield Sample("rotary-pairs", pairs, "neighbours are turned, in a part of the head")
    yield Sample("bias", call((35, 0, 3), 2, 8, bias=table(2, 35)), "a bias of relative positions")
    form = {"window": (8, 4), "rotary": turned(67, 24), "bias": table(4, 80)}
    modern = call((67, 12), 4, 32, tail=1, kv_heads=2, p=0.1, **form)
    yield Sample("modern", modern, "all at once")


def cost(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: tuple[int, int] | None = None,
    causal: bool = False,
    kv_heads: int | None = None,
    **options: object,
) -> Cost:
    """Reads qkv and writes out; two products of 2 D a head and pair of query and key forward, five backward."""
    H, _kv, D = sizes(qkv, qkv.shape[2] if kv_heads is None else kv_heads)
    left, right = bounds(window, causal)
    seen = 0
    for _b, start, end in _spans(cu_seqlens):
        i = torch.arange(end - start)
        first = torch.zeros_like(i) if left < 0 else (i - left).clamp(min=0)
        last = (
            torch.full_like(i, end - start - 1)
            if right < 0
            else (i + right).clamp(max=end - start - 1)
        )
        # a causal call's products run over whole tiles: both halves are counted, as for other kernels
        seen += (end - start) ** 2 if (left, right) == (-1, 0) else int((last - first + 1).sum())
    product = 2 * seen * H * D
    moved = nbytes(qkv) + qkv.shape[0] * H * D * qkv.element_size()
    return Cost(moved, 2 * product, 2 * moved, 5 * product)
