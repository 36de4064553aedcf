"""Attention as it is and as it flows: maps of single heads, rollout, and rollout weighted by gradients.

An observer sees each layer's q, k and log-sum-exps beside the kernels' work. One layer's weights exist at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.reference.attention_form import split
from fastbert.interpret.question import Question, still
from fastbert.models.inputs import prepare
from fastbert.nn.attention_maps import Maps, rebuilt
from fastbert.nn.layer import LayerCall, LayerSettings, Observer


@contextmanager
def observed(model: Any, observers: Mapping[int, Observer]) -> Iterator[None]:
    """Call the layers' observers, by layer, in the model's forwards inside; its prepacked copies rest."""
    encoder = model.bert
    parts: dict[int, Any] = {i: getattr(encoder.layers[i], "attention", None) for i in observers}
    if None in parts.values():
        raise ValueError(
            f"the layers are {type(encoder.layers[0]).__name__}s, which have no attention: choose another method"
        )
    frozen, encoder.frozen = encoder.frozen, None
    for i, observer in observers.items():
        parts[i].observer = observer
    try:
        yield
    finally:
        encoder.frozen = frozen
        for part in parts.values():
            part.observer = None


@torch.no_grad()
def attention_maps(
    model: Any,
    inputs: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """{layer: softmax weights (B, heads, rows, S)} of a model of fastbert.bert, with zeros at padding.

    `inputs` are arguments of the model's forward, padded or packed. `layers`, `heads` and `rows` number what is wanted,
    from 0; None is all. Rows are the columns of the padded batch, or offsets in packed sequences. The weights are
    rebuilt from q, k and the log-sum-exps that attention saves, after dropout's place: no dropout is in them. Raises
    ValueError for numbers that are not there.
    """
    config = model.config
    layers = _numbers("layer", layers, config.num_hidden_layers)
    prepared = prepare(config, **{k: v for k, v in inputs.items() if k != "labels"})
    packing = prepared.packing
    most = packing.max_seqlen if packing.length is None else packing.length
    rows = None if rows is None else _numbers("row", rows, most)
    maps = {}
    for i in layers:
        chosen = heads if heads is None else _numbers("head", heads, config.layer_sizes[i][0])
        maps[i] = Maps(packing, chosen, rows)
    with still(model), observed(model, maps):
        model.bert.encode(prepared)
    empty = prepared.packing.batch, 0, most if rows is None else len(rows), most
    # a layer without heads calls no observer
    return {i: m.found[0] if m.found else torch.zeros(empty) for i, m in maps.items()}


def heads_of(q: Question, layers: Sequence[int]) -> dict[int, Tensor]:
    """{layer: softmax weights (heads, S, S)} of a question's tokens, zeros between its two texts."""
    maps = attention_maps(q.model, q.packed(q.ids[None])[0], layers)
    found = {}
    for i, m in maps.items():
        blocks = [
            [part[h, :n, :n] for part, n in zip(m, q.lengths, strict=True)]
            for h in range(m.shape[1])
        ]
        found[i] = torch.stack([torch.block_diag(*block) for block in blocks]).cpu()
    return found


def _numbers(what: str, numbers: Sequence[int] | None, count: int) -> list[int]:
    """The numbers, all of them for None; refuses one that is not there."""
    for i in numbers or ():
        if not 0 <= i < count:
            raise ValueError(
                f"there is no {what} {i}: the {what}s are numbered from 0 to {count - 1}"
            )
    return list(range(count) if numbers is None else numbers)


def _readout(q: Question) -> Tensor:
    """(S,) weights of the hidden states that the target reads, 1 in all for each text."""
    if q.target.places:
        w = torch.zeros(len(q.ids))
        w[list(q.target.places)] = 1 / len(q.target.places)
        return w
    return torch.cat([torch.full((n,), 1 / n) for n in q.lengths])


def _sequences(c: LayerCall) -> Iterator[slice]:
    starts = c.cu_seqlens.tolist()
    return (slice(a, b) for a, b in itertools.pairwise(starts))


@torch.no_grad()
def rollout(q: Question) -> tuple[Tensor, None]:
    """Attention rollout (Abnar and Zuidema 2020), at the tokens that the target reads.

    R = (A + I) / 2 R, layer by layer, where A is the mean of the heads' weights.
    """
    flows: dict[int, Tensor] = {}

    def observe(qkv: Tensor, _: Tensor, lse: Tensor, s: LayerSettings, c: LayerCall) -> None:
        for i, sequence in enumerate(_sequences(c)):
            a = rebuilt(qkv, lse, s, c, sequence).mean(0)
            half = (a + torch.eye(len(a), dtype=a.dtype, device=a.device)) / 2
            flows[i] = half @ flows[i] if i in flows else half

    with observed(q.model, dict.fromkeys(range(len(q.model.bert.layers)), observe)):
        q.model.bert.encode(prepare(q.model.config, **q.packed(q.ids[None])[0]))
    parts = zip(_readout(q).split(q.lengths), flows.values(), strict=True)
    return torch.cat([w @ r.float().cpu() for w, r in parts]).masked_fill(q.fixed, 0.0), None


def gradient_rollout(q: Question) -> tuple[Tensor, None]:
    """Rollout of the heads' weights times their gradients (Chefer et al. 2021), at the tokens that the target reads.

    r = r + r E_h[max(dA * A, 0)] in backward, from the last layer to the first: dA = dO V' of the attention's output O,
    and no R of S x S is needed.
    """
    flow = _readout(q).to(q.model.device)

    def observe(qkv: Tensor, y: Tensor, lse: Tensor, s: LayerSettings, c: LayerCall) -> None:
        if not y.requires_grad:
            return  # a target may run the model for constants too
        kv_heads = s.heads if s.kv_heads is None else s.kv_heads
        h = torch.arange(s.heads, device=y.device) * kv_heads // s.heads

        def add(dout: Tensor) -> None:
            for sequence in _sequences(c):
                a = rebuilt(qkv, lse, s, c, sequence)  # (H, L, L)
                v = split(qkv.detach()[sequence], kv_heads)[2].transpose(0, 1)[h]
                da = dout[sequence].transpose(0, 1).to(a) @ v.to(a).mT
                flow[sequence] += flow[sequence] @ (da * a).clamp(min=0).mean(0).float()

        y.register_hook(add)

    layers = range(len(q.model.bert.layers))
    with observed(q.model, dict.fromkeys(layers, observe)):
        next(q.gradients(q.embeddings()[None]))
    return (flow.cpu() - _readout(q)).masked_fill(q.fixed, 0.0), None
