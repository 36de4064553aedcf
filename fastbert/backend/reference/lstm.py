"""lstm: the recurrence of an LSTM layer over packed sequences (Hochreiter and Schmidhuber 1997).

    i, f, o = sigmoid(z),  g = tanh(z),  z = gates_t + weight h_(t-1)
    c_t = f c_(t-1) + i g,  h_t = o tanh(c_t)

The first direction reads each sequence from its first token on, the second from its last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision, nbytes


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def _walks(D: int, cu_seqlens: Tensor) -> Iterator[tuple[int, int, list[int]]]:
    """(direction, sequence, rows in the order of its steps) of every walk through a sequence."""
    for d in range(D):
        for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            yield d, b, list(range(start, end))[:: -1 if d else 1]


def _state(state: Tensor | None, d: int, b: int, like: Tensor) -> Tensor:
    """The initial state (H,) of a sequence, zeros where there is none."""
    return like.new_zeros(like.shape[-1]) if state is None else state[d, b]


def forward(
    gates: Tensor,  # (T, D 4 H)
    weights: Sequence[Tensor],  # D of (4H, H)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    h0: Tensor | None,  # (D, B, H)
    c0: Tensor | None,  # (D, B, H)
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D H) in gates' dtype, cells (T, D H) fp32, and i, f, g, o (T, D 4 H) in gates' dtype, empty without `save`.

    Rows from cu_seqlens[-1] on are not read; results there are 0.
    """
    D, H = len(weights), weights[0].shape[1]
    wide, first_h, first_c, *ws = widen(gates, h0, c0, *weights)
    # connected to the graph also where there is no token
    y, cells = (wide.new_zeros(wide.shape[0], D, H) + wide[:0].sum() for _ in range(2))
    activated = wide.new_zeros(wide.shape[0], D, 4, H)
    for d, b, rows in _walks(D, cu_seqlens):
        h, c = _state(first_h, d, b, wide[:0, :H]), _state(first_c, d, b, wide[:0, :H])
        for row in rows:
            i, f, g, o = (wide[row].view(D, -1)[d] + ws[d] @ h.to(wide.dtype)).chunk(4)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            y[row, d], cells[row, d], activated[row, d] = h, c, torch.stack([i, f, g, o])
    kept = activated.flatten(1).to(gates.dtype)
    return y.flatten(1).to(gates.dtype), cells.flatten(1), kept if save else kept[:0]


def backward(
    dy: Tensor,  # (T, D H)
    activated: Tensor,  # (T, D 4 H)
    y: Tensor,  # (T, D H)
    cells: Tensor,  # (T, D H)
    weights: Sequence[Tensor],  # D of (4H, H)
    cu_seqlens: Tensor,
    max_seqlen: int,
    h0: Tensor | None,  # (D, B, H)
    c0: Tensor | None,  # (D, B, H)
    needs: Sequence[bool],  # for weights, h0, c0
    dcells: Tensor | None,  # (T, D H)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dgates (T, D 4 H), dweights (D 4 H, H), dh0 and dc0 (D, B, H); those that are not needed are empty.

    With dh and dc of a step, from dy, dcells and the step after it:
        do = dh tanh(c),  dc += dh o (1 - tanh(c)^2)
        di = dc g,  df = dc c_(t-1),  dg = dc i,  each times its activation's derivative: dz
        dc_(t-1) = dc f,  dh_(t-1) = weight^T dz,  dweight += dz h_(t-1)^T
    """
    D, H = len(weights), weights[0].shape[1]
    wide, out, saved, more, first_h, first_c, *ws = widen(
        dy, y, activated, dcells, h0, c0, *weights
    )
    wide, out, c_all = (t.view(-1, D, H) for t in (wide, out, cells))
    saved, dgates = saved.view(-1, D, 4, H), torch.zeros_like(saved)
    dz_all = dgates.view(-1, D, 4 * H)
    dweights = [torch.zeros_like(w) for w in ws]
    dh0, dc0 = (wide.new_zeros(D, cu_seqlens.shape[0] - 1, H) for _ in range(2))
    for d, b, rows in _walks(D, cu_seqlens):
        dh, dc = dh0[d, b], dc0[d, b]
        for row, last in reversed(list(zip(rows, [None, *rows], strict=False))):
            h, c = (
                _state(first, d, b, wide) if last is None else known[last, d]
                for first, known in ((first_h, out), (first_c, c_all))
            )
            i, f, g, o = saved[row, d]
            u, dh = c_all[row, d].tanh(), dh + wide[row, d]
            dc = dc + dh * o * (1 - u * u)
            if more is not None:
                dc = dc + more.view(-1, D, H)[row, d]
            dz = torch.cat(
                [
                    dc * g * i * (1 - i),
                    dc * c * f * (1 - f),
                    dc * i * (1 - g * g),
                    dh * u * o * (1 - o),
                ]
            )
            dweights[d] += dz.outer(h.to(dz.dtype))
            dz_all[row, d], dh, dc = dz, ws[d].t() @ dz, dc * f
        dh0[d, b], dc0[d, b] = dh, dc
    return (
        dgates.to(dy.dtype),
        torch.cat(dweights).to(weights[0].dtype) if needs[0] else weights[0].new_empty(0),
        dh0 if needs[1] else dh0.new_empty(0),
        dc0 if needs[2] else dc0.new_empty(0),
    )


def eager(
    gates: Tensor,
    weights: Sequence[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    return_cells: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stock ops in the tested dtype, one sequence at a time."""
    D, H, T = len(weights), weights[0].shape[1], gates.shape[0]
    empty = gates.new_zeros(H)
    ys, cells = ([[empty] * D for _ in range(T)] for _ in range(2))
    for d, b, rows in _walks(D, cu_seqlens):
        h, c = (_state(s, d, b, gates[:0, :H]).to(gates.dtype) for s in (h0, c0))
        for row in rows:
            z = gates[row].view(D, -1)[d] + linear(h, weights[d].to(gates.dtype))
            i, f, g, o = z.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            ys[row][d], cells[row][d] = h, c
    if not T:
        y = gates.view(0, D, 4, H)[:, :, 0].flatten(1)
        return (y, y) if return_cells else y
    y, c = (torch.stack([torch.cat(parts) for parts in rows]) for rows in (ys, cells))
    return (y, c) if return_cells else y


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.lstm`."""
    draw = Draw(dtype, device, seed)

    def call(
        lengths: tuple[int, ...],
        H: int,
        D: int = 1,
        tail: int = 0,
        states: bool = False,
        weight: torch.dtype | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> dict[str, Any]:
        gates = draw.normal(sum(lengths) + tail, D * 4 * H, scale=scale)
        gates[sum(lengths) :] = float("nan")
        given = [draw.normal(4 * H, H, scale=H**-0.5, dtype=weight) for _ in range(D)]
        call = {
            "gates": gates,
            "weights": given,
            "cu_seqlens": draw.cu_seqlens(*lengths),
            "max_seqlen": max(lengths, default=0),
        }
        if states:
            call |= {name: draw.normal(D, len(lengths), H) for name in ("h0", "c0")}
        return call | options

    yield Sample("S1x9-H1-D1", call((1,) * 9, 1), "one step, one unit")
    yield Sample("S4-1-2-H3-D2", call((4, 1, 2), 3, 2), "both directions, fewer units than lanes")
    yield Sample("S1-H2-D1", call((1,), 2), "one token")
    yield Sample("S2-0-5-H3-D1-states", call((2, 0, 5), 3, states=True), "an empty sequence")
    yield Sample(
        "S6-4-H5-D2-cells",
        call((6, 4), 5, 2, states=True, return_cells=True),
        "a loss on cells, initial states of both directions",
    )
    yield Sample("S9-3-7-3-H16-D2", call((9, 3, 7, 3), 16, 2), "whole vectors, equal lengths")
    yield Sample("tail", call((5, 6), 5, 2, tail=3), "rows past the end: never read, zeros out")
    yield Sample("large", call((6, 4), 4, 1, scale=30.0), "saturated gates: no overflow")
    lengths = (11, 2, 9, 1, 7, 7, 3, 10, 4, 5, 6, 8, 2, 3, 4, 12, 1)
    yield Sample("B17-H21-D1", call(lengths, 21), "more sequences than rows of a tile")
    yield Sample("S5-3-H70-D2", call((5, 3), 70, 2, states=True), "sums of more than one slice")
    if low_precision(dtype):
        yield Sample(
            "fp32-weights", call((5, 3), 6, 2, weight=torch.float32), "mixed: weights in fp32"
        )
    yield Sample("empty", call((), 4, 2), "no token: nothing, connected")


def cost(
    gates: Tensor,
    weights: Sequence[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    *_: object,
    **__: object,
) -> Cost:
    """Reads gates and weights, writes y, cells and activated gates; backward also reads those, and has two products."""
    T, H = int(cu_seqlens[-1]), weights[0].shape[1]
    flops = 2 * T * len(weights) * 4 * H * H
    width = T * len(weights) * H
    moved = nbytes(gates, *weights) + 4 * width + width * gates.element_size()
    return Cost(
        moved + nbytes(gates), flops, 2 * moved + nbytes(gates) + nbytes(*weights), 2 * flops
    )
