"""qkv_proj: query, key and value projections in one GEMM, laid out for attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backend.chooser import choose
from fastbert.backend.reference.qkv_proj import eager
from fastbert.backend.tuned import TunedBy
from fastbert.ops import _check
from fastbert.ops._register import once_differentiable, record, register, shared, sums, wants_grad
from fastbert.ops.context import autocast, exported_as


def _fwd_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], num_heads: int, *_: Any
) -> Any:
    rows = sum(w.shape[0] for w in weights)
    return x.new_empty(x.shape[0], 3, num_heads, rows // (3 * num_heads))


def _bwd_fake(
    dqkv: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    dtype: torch.dtype,
    *_: Any,
) -> Any:
    rows = sum(w.shape[0] for w in weights)
    empty = dqkv.new_empty
    return (
        torch.empty_like(x) if needs[0] else empty(0),
        x.new_empty(rows, x.shape[1], dtype=dtype) if needs[1] else empty(0),
        x.new_empty(rows, dtype=sums(x)) if needs[2] else empty(0),
    )


_fwd = register(
    "qkv_proj",
    "forward",
    "(Tensor x, Tensor[] weights, Tensor[] biases, int num_heads) -> Tensor",
    _fwd_fake,
    tuned_by=TunedBy(dtype="x", sizes="weights", rows="x"),
)
_bwd = register(
    "qkv_proj",
    "backward",
    "(Tensor dqkv, Tensor x, Tensor[] weights, bool[] needs, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    tuned_by=TunedBy(dtype="dqkv", sizes="weights", rows="dqkv"),
)


class _QKVProj(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_heads: int, parts: int, backend: str, *tensors: Tensor
    ) -> Tensor:
        weights, biases = list(tensors[:parts]), list(tensors[parts:])
        copies = shared(x, weights)
        ctx.save_for_backward(x, *copies)
        ctx.parts, ctx.dtype, ctx.backend = parts, weights[0].dtype, backend
        return _fwd(x, copies, biases, num_heads, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dqkv: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_weights, of_biases = wanted[4 : 4 + ctx.parts], wanted[4 + ctx.parts :]
        needs = [wanted[0], any(of_weights), any(of_biases)]
        dx, dweight, dbias = _bwd(dqkv.contiguous(), x, weights, needs, ctx.dtype, ctx.backend)
        rows = weights[0].shape[0]
        grads: list[Tensor | None] = []
        for whole, each in ((dweight, of_weights), (dbias, of_biases)):
            parts = whole.split(rows) if any(each) else (None,) * len(each)
            grads += [part if need else None for part, need in zip(parts, each, strict=True)]
        return dx if wanted[0] else None, None, None, None, *grads


def _check_all(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], num_heads: int
) -> None:
    if len(weights) not in (1, 3):
        raise ValueError(f"weights holds {len(weights)} tensors: pass one (3C, C) or three (C, C)")
    if len(biases) not in (0, len(weights)):
        raise ValueError(
            f"biases holds {len(biases)} tensors for {len(weights)} weights: pass as many, or None"
        )
    parts = {f"weights[{i}]": w for i, w in enumerate(weights)}
    vectors = {f"biases[{i}]": b for i, b in enumerate(biases)}
    _check.floating(x=x, **parts, **vectors)
    _check.shape("x", x, -1, -1)
    _check.has_rows(x)
    rows = weights[0].shape[0]
    heads = 3 * num_heads // len(weights)
    if num_heads < 1 or rows % heads:
        raise ValueError(
            f"weights[0] has {rows} rows, which {heads} heads do not divide: check num_heads={num_heads}"
        )
    for name, w in parts.items():
        _check.shape(name, w, rows, x.shape[1])
    for name, b in vectors.items():
        _check.shape(name, b, rows)
    _check.same_device(x=x, **parts, **vectors)
    dtypes = {t.dtype for t in (*weights, *biases)}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise TypeError(f"weights and biases mix {names}: use one dtype for all of them")


@exported_as(eager)
def qkv_proj(
    x: Tensor,  # (T, C)
    weights: Sequence[Tensor],  # [(3HD, C)] or 3 of (HD, C)
    biases: Sequence[Tensor] | None,  # likewise
    num_heads: int,
) -> Tensor:
    """Query, key and value of packed tokens in one GEMM -> (T, 3, H, D) in x's dtype, or autocast's.

    Three weights that lie side by side in memory are used without a copy. Saves x and the weights, on a GPU in x's
    dtype. Refuses any other number of weights, rows that the heads do not divide, mixed weight dtypes. Vaswani et al.
    2017.
    """
    biases = [] if biases is None else list(biases)
    weights = list(weights)
    _check_all(x, weights, biases, num_heads)
    x = autocast(x).contiguous()
    backend = choose("qkv_proj", x.device, x, weights, biases, num_heads)
    if wants_grad(x, *weights, *biases):
        return record(_QKVProj, x, num_heads, len(weights), backend, *weights, *biases)
    return _fwd(x, weights, biases, num_heads, backend)
