"""lstm: the recurrence of an LSTM layer over packed sequences, all directions at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.lstm import eager
from fastbert.ops import _check
from fastbert.ops._register import (
    none_if_empty,
    once_differentiable,
    record,
    register,
    sums,
    wants_grad,
)
from fastbert.ops.context import autocast, exported_as


def _fwd_check(
    gates: Tensor, weights: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int, *_: Any
) -> None:
    _check.cu_seqlens_valid(cu_seqlens, gates.shape[0], max_seqlen)


def _fwd_fake(gates: Tensor, weights: Sequence[Tensor], *rest: Any) -> Any:
    save = rest[-2]
    y = gates.new_empty(gates.shape[0], gates.shape[1] // 4)
    return y, y.new_empty(y.shape, dtype=sums(y)), torch.empty_like(gates if save else gates[:0])


def _bwd_fake(dy: Tensor, activated: Tensor, y: Tensor, *rest: Any) -> Any:
    weights, cu_seqlens = rest[1], rest[2]
    needs = rest[-3]
    D, (rows, H) = len(weights), weights[0].shape
    state = (D, cu_seqlens.shape[0] - 1, H)
    empty = dy.new_empty
    return (
        torch.empty_like(activated),
        weights[0].new_empty(D * rows, H) if needs[0] else weights[0].new_empty(0),
        *(empty(state if need else 0, dtype=sums(dy)) for need in needs[1:]),
    )


_fwd = register(
    "lstm",
    "forward",
    "(Tensor gates, Tensor[] weights, Tensor cu_seqlens, SymInt max_seqlen, Tensor? h0, Tensor? c0, bool save) "
    "-> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_check,
)
_bwd = register(
    "lstm",
    "backward",
    "(Tensor dy, Tensor activated, Tensor y, Tensor cells, Tensor[] weights, Tensor cu_seqlens, SymInt max_seqlen, "
    "Tensor? h0, Tensor? c0, bool[] needs, Tensor? dcells) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        h0: Tensor | None,
        c0: Tensor | None,
        backend: str,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        args = (list(weights), cu_seqlens, max_seqlen, h0, c0)
        y, cells, activated = _fwd(gates, *args, True, backend)
        ctx.save_for_backward(activated, y, cells, cu_seqlens, h0, c0, *weights)
        ctx.scalars = (max_seqlen, backend)
        # a cell that no loss depends on costs no tensor of zeros
        ctx.set_materialize_grads(False)
        return y, cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dcells: Tensor | None) -> Any:
        activated, y, cells, cu_seqlens, h0, c0, *weights = ctx.saved_tensors
        max_seqlen, backend = ctx.scalars
        of_h0, of_c0, of_weights = (
            ctx.needs_input_grad[3],
            ctx.needs_input_grad[4],
            ctx.needs_input_grad[6:],
        )
        dgates, dweights, dh0, dc0 = _bwd(
            torch.zeros_like(y) if dy is None else dy.contiguous(),
            activated,
            y,
            cells,
            weights,
            cu_seqlens,
            max_seqlen,
            h0,
            c0,
            [any(of_weights), of_h0, of_c0],
            None if dcells is None else dcells.contiguous(),
            backend,
        )
        parts = dweights.split(weights[0].shape[0]) if any(of_weights) else [None] * len(weights)
        return (
            dgates if ctx.needs_input_grad[0] else None,
            None,
            None,
            none_if_empty(dh0),
            none_if_empty(dc0),
            None,
            *(part if need else None for part, need in zip(parts, of_weights, strict=True)),
        )


def _check_all(
    gates: Tensor,
    weights: Sequence[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    states: dict[str, Tensor | None],
) -> None:
    if len(weights) not in (1, 2):
        raise ValueError(
            f"weights holds {len(weights)} tensors: pass one (4H, H) for each direction, 1 or 2"
        )
    named = {f"weights[{d}]": w for d, w in enumerate(weights)}
    _check.floating(gates=gates, **named, **states)
    _check.shape("weights[0]", weights[0], -1, -1)
    H = weights[0].shape[1]
    if H == 0:
        raise ValueError("weights[0] has no column: a layer has at least one unit")
    for name, w in named.items():
        _check.shape(name, w, 4 * H, H)
    _check.shape("gates", gates, -1, len(weights) * 4 * H)
    _check.sequences(cu_seqlens, max_seqlen)
    for name, state in states.items():
        _check.shape(name, state, len(weights), cu_seqlens.shape[0] - 1, H)
    _check.same_device(gates=gates, **named, cu_seqlens=cu_seqlens, **states)
    if weights[0].dtype != weights[-1].dtype:
        raise TypeError(
            f"weights mix {weights[0].dtype} and {weights[-1].dtype}: use one dtype for both"
        )


@exported_as(eager)
def lstm(
    gates: Tensor,  # (T, D 4 H)
    weights: Sequence[Tensor],  # D of (4H, H)
    cu_seqlens: Tensor,  # (B + 1,) int32
    max_seqlen: int,
    h0: Tensor | None = None,  # (D, B, H)
    c0: Tensor | None = None,  # (D, B, H)
    *,
    return_cells: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The outputs y (T, D H) of an LSTM layer in gates' dtype, or autocast's; the weights may be of another dtype.

        i, f, o = sigmoid(z),  g = tanh(z),  z = gates_t + weight h_(t-1)
        c_t = f c_(t-1) + i g,  h_t = o tanh(c_t)

    `gates` are the rows x W_ih^T + b_ih + b_hh of each direction, one GEMM over all tokens; its columns are i, f, g and
    o of the first direction, then those of the second, which reads each sequence from its end. Sequence b is rows
    cu_seqlens[b] to cu_seqlens[b + 1]; rows past cu_seqlens[-1] are not read and come out zero. h0 and c0 are the
    states before the first step, zeros where they are None. h and c are fp32 between steps, fp64 where gates are.

    return_cells: also return c of every token (T, D H) in fp32, whose last rows are a sequence's final cells.

    Saves y, the cells and the activated gates. Refuses shapes that don't fit, integer tensors, other numbers of weights
    than 1 and 2, weights of mixed dtypes, and on the CPU cu_seqlens that fall or run past T. Hochreiter and Schmidhuber
    1997.
    """
    weights = list(weights)
    _check_all(gates, weights, cu_seqlens, max_seqlen, {"h0": h0, "c0": c0})
    gates = autocast(gates).contiguous()
    h0, c0 = (None if t is None else t.contiguous() for t in (h0, c0))
    weights = [w.contiguous() for w in weights]
    args = (gates, weights, cu_seqlens.contiguous(), max_seqlen, h0, c0)
    save = wants_grad(gates, *weights, h0, c0)
    backend = choose("lstm", gates.device, *args, save)
    if save:
        y, cells = record(_LSTM, gates, *args[2:], backend, *weights)
    else:
        y, cells, _ = _fwd(*args, False, backend)
    return (y, cells) if return_cells else y
