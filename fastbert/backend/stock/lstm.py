"""lstm by stock ops, a step of the padded batch at a time.

`torch.lstm` takes an input and its weight, not the gates of all tokens: fastbert.nn.LSTM calls it on devices for which
no backend has a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastbert.backend.stock._layout import Layout


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def _wide(t: Tensor) -> Tensor:
    """t in fp32, or fp64 where it is that."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _empty(T: int, cu_seqlens: Tensor, max_seqlen: int) -> bool:
    return T == 0 or max_seqlen == 0 or cu_seqlens.shape[0] == 1


def _turned(padded: Tensor, d: int) -> Tensor:
    """(B, S, ...) with the columns in the order of a direction's steps, and back."""
    return padded.flip(1) if d else padded


def _padded(rows: Tensor, layout: Layout, D: int) -> Iterator[Tensor]:
    """(T, D ...) -> (B, S, ...) of each direction, in the order of its steps."""
    parts = _wide(rows)[layout.row].chunk(D, -1)
    return (_turned(part, d) for d, part in enumerate(parts))


def _rows(steps: Sequence[Sequence[Tensor]], layout: Layout) -> Tensor:
    """(B, ...) of every step of each direction -> (T, D ...), zeros in the tail."""
    padded = [_turned(torch.stack(list(of_d), 1), d) for d, of_d in enumerate(steps)]
    return layout.unpad(torch.cat(padded, -1)[:, None]).squeeze(1)


def _state(state: Tensor | None, d: int, like: Tensor) -> Tensor:
    """(B, H) of a direction's initial state, zeros where there is none."""
    return torch.zeros_like(like) if state is None else state[d].to(like.dtype)


def forward(
    gates: Tensor,  # (T, D 4 H)
    weights: Sequence[Tensor],  # D of (4H, H)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    h0: Tensor | None,  # (D, B, H)
    c0: Tensor | None,  # (D, B, H)
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D H) in gates' dtype, cells (T, D H) fp32; i, f, g, o (T, D 4 H) in gates' dtype, empty without `save`."""
    T, D, H = gates.shape[0], len(weights), weights[0].shape[1]
    if _empty(T, cu_seqlens, max_seqlen):
        y = gates.new_zeros(T, D * H)
        return y, _wide(y).clone(), torch.zeros_like(gates if save else gates[:0])
    layout = Layout(cu_seqlens, T, max_seqlen)
    ys, cells, kept = ([list[Tensor]() for _ in range(D)] for _ in range(3))
    for d, z_all in enumerate(_padded(gates, layout, D)):
        weight, valid = _wide(weights[d]).to(z_all.dtype).t(), _turned(layout.valid, d)[..., None]
        h, c = (_state(state, d, z_all[:, 0, :H]) for state in (h0, c0))
        for t in range(layout.S):
            i, f, g, o = (z_all[:, t] + h @ weight).chunk(4, -1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            cell = f * c + i * g
            out = o * cell.tanh()
            # at padding a sequence's states wait: the second direction meets padding first
            h, c = torch.where(valid[:, t], out, h), torch.where(valid[:, t], cell, c)
            ys[d].append(h)
            cells[d].append(c)
            if save:
                kept[d].append(torch.cat([i, f, g, o], -1))
    activated = _rows(kept, layout) if save else gates[:0]
    y = _rows(ys, layout).to(gates.dtype)
    return y, _rows(cells, layout), activated.to(gates.dtype, copy=not save)


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
    """dgates (T, D 4 H), dweights (D 4 H, H), dh0 and dc0 (D, B, H) fp32; those that are not needed are empty."""
    T, D, H = dy.shape[0], len(weights), weights[0].shape[1]
    dweights = [torch.zeros_like(_wide(w)) for w in weights]
    states = [_wide(dy).new_zeros(D, cu_seqlens.shape[0] - 1, H) for _ in range(2)]
    dgates = torch.zeros_like(activated)
    if not _empty(T, cu_seqlens, max_seqlen):
        layout = Layout(cu_seqlens, T, max_seqlen)
        if dcells is None:
            dcells = torch.zeros_like(cells)
        padded = zip(
            *(_padded(t, layout, D) for t in (dy, activated, y, cells, dcells)), strict=True
        )
        grads: list[list[Tensor]] = [[] for _ in range(D)]
        for d, (of_y, saved, out, c_all, more) in enumerate(padded):
            weight, valid = _wide(weights[d]).to(out.dtype), _turned(layout.valid, d)[..., None]
            dh, dc = (torch.zeros_like(out[:, 0]) for _ in range(2))
            starts = [_state(state, d, out[:, 0]) for state in (h0, c0)]
            for t in reversed(range(layout.S)):
                # the states before the step: the initial ones at the first token
                begins = valid[:, t] & ~valid[:, t - 1] if t else valid[:, t]
                h, c = (
                    torch.where(begins, first, known[:, max(t - 1, 0)])
                    for first, known in zip(starts, (out, c_all), strict=True)
                )
                i, f, g, o = saved[:, t].chunk(4, -1)
                u, into = c_all[:, t].tanh(), dh + of_y[:, t]
                inner = dc + into * o * (1 - u * u) + more[:, t]
                dz = torch.cat(
                    [
                        inner * g * i * (1 - i),
                        inner * c * f * (1 - f),
                        inner * i * (1 - g * g),
                        into * u * o * (1 - o),
                    ],
                    -1,
                ).masked_fill_(~valid[:, t], 0.0)
                dweights[d].addmm_(dz.t(), h)
                dh = torch.where(valid[:, t], dz @ weight, dh)
                dc = torch.where(valid[:, t], inner * f, dc)
                grads[d].append(dz)
            states[0][d], states[1][d] = dh, dc
        dgates = _rows([of_d[::-1] for of_d in grads], layout).to(activated.dtype)
    dweight = torch.cat(dweights).to(weights[0].dtype) if needs[0] else weights[0].new_empty(0)
    dh0, dc0 = (
        state if need else state.new_empty(0) for state, need in zip(states, needs[1:], strict=True)
    )
    return dgates, dweight, dh0, dc0
