"""attention: softmax(scale Q K^T) V inside each packed sequence, dropout on the weights (Vaswani et al. 2017)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backend.reference import philox
from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, nbytes


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """(b, start, end) of every sequence that has a token."""
    bounds = cu_seqlens.tolist()
    pairs = enumerate(itertools.pairwise(bounds))
    return [(b, start, end) for b, (start, end) in pairs if end > start]


def _heads(packed: Tensor) -> Tensor:
    """(L, H, D) -> (H, L, D)."""
    return packed.transpose(0, 1)


def _weights(q: Tensor, k: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) (H, L, L) and its log-sum-exp (H, L), for q and k (H, L, D)."""
    scores = scale * q @ k.transpose(1, 2)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]), lse


def _factor(
    seed: Tensor | None, site: int, b: int, H: int, L: int, p: float, like: Tensor
) -> Tensor:
    """Dropout's factor of the weights (H, L, L) of sequence b: 0 or 1 / (1 - p)."""
    if p == 0.0 or seed is None:
        return torch.ones((), dtype=like.dtype, device=like.device)
    bh = b * H + torch.arange(H, device=like.device)
    return philox.attention_keep_mask(seed, site, bh, L, L, p).to(like.dtype) / (1.0 - p)


def forward(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    causal: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in qkv's dtype and lse (H, T) fp32, empty without `save`; zeros past cu_seqlens[-1]."""
    T, _, H, _ = qkv.shape
    (wide,) = widen(qkv)
    outs, lses, done = [], [], 0
    for b, start, end in _spans(cu_seqlens):
        q, k, v = (_heads(t) for t in wide[start:end].unbind(1))
        P, lse = _weights(q, k, scale, causal)
        outs.append(_heads((P * _factor(seed, site, b, H, end - start, p, P)) @ v))
        lses.append(lse)
        done = end
    outs += [wide[:0, 0], wide.new_zeros(T - done, *wide.shape[2:])]
    lses.append(wide.new_zeros(H, T - done))
    lse = torch.cat(lses, 1) if save else wide.new_empty(H, 0)
    return torch.cat(outs).to(qkv.dtype), lse


def backward(
    dout: Tensor,  # (T, H, D)
    qkv: Tensor,  # (T, 3, H, D)
    out: Tensor,  # (T, H, D)
    lse: Tensor,  # (H, T)
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
    causal: bool,
) -> Tensor:
    """dqkv (T, 3, H, D), zeros past cu_seqlens[-1].

    With P the weights, M dropout's factor and delta = rowsum(dout * out):
        dV = (P M)^T dout,  dS = P (M dout V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q
    """
    H = qkv.shape[2]
    wide, g, o = widen(qkv, dout, out)
    dqkv = torch.zeros_like(wide)
    for b, start, end in _spans(cu_seqlens):
        q, k, v = (_heads(t) for t in wide[start:end].unbind(1))
        do = _heads(g[start:end])
        P, _ = _weights(q, k, scale, causal)
        M = _factor(seed, site, b, H, end - start, p, P)
        delta = (do * _heads(o[start:end])).sum(-1, keepdim=True)
        dS = P * (M * (do @ v.transpose(1, 2)) - delta)
        grads = (scale * dS @ k, scale * dS.transpose(1, 2) @ q, (P * M).transpose(1, 2) @ do)
        dqkv[start:end] = torch.stack([_heads(t) for t in grads], 1)
    return dqkv.to(qkv.dtype)


def eager(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    causal: bool = False,
    seed: Tensor | None = None,
    site: int = 0,
    return_lse: bool = False,
) -> Tensor:
    """Stock ops in the tested dtype, one sequence at a time."""
    T, _, H, D = qkv.shape
    scale = D**-0.5 if scale is None else scale
    outs, done = [], 0
    for b, start, end in _spans(cu_seqlens):
        q, k, v = (_heads(t) for t in qkv[start:end].unbind(1))
        scores = scale * q @ k.transpose(1, 2)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        P = scores.softmax(-1)
        outs.append(_heads((P * _factor(seed, site, b, H, end - start, p, P)) @ v))
        done = end
    return torch.cat([*outs, qkv[:0, 0], qkv.new_zeros(T - done, H, D)])


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.attention`."""
    draw = Draw(dtype, device, seed)

    def call(
        lengths: tuple[int, ...], H: int, D: int, tail: int = 0, p: float = 0.0, **options: object
    ) -> dict:
        qkv = draw.normal(sum(lengths) + tail, 3, H, D)
        if tail:
            qkv[sum(lengths) :] = float("nan")
        kwargs = {
            "qkv": qkv,
            "cu_seqlens": draw.cu_seqlens(*lengths),
            "max_seqlen": max(lengths, default=0),
        }
        return kwargs | options | ({"p": p, "seed": draw.seed(), "site": 1} if p else {})

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


def cost(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **_: object) -> Cost:
    """Reads qkv and writes out; two products of 2 L^2 D a head forward, five backward."""
    H, D = qkv.shape[2:]
    product = sum(2 * (end - start) ** 2 * H * D for _, start, end in _spans(cu_seqlens))
    moved = nbytes(qkv) * 4 // 3
    return Cost(moved, 2 * product, 2 * moved, 5 * product)
