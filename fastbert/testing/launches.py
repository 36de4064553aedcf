"""Calls that launch every Triton kernel in every configuration, on meta tensors: nothing is computed or allocated.

`calls(dtype, full)` labels each call by op, direction and settings; `full=False` gives about one call per kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import (
    attention,
    bias_gelu,
    cross_entropy,
    dropout_add_layer_norm,
    embed,
    feed_forward,
    gated_feed_forward,
    layer_norm,
    linear,
    linear_int8,
    loss_width,
    mlm_loss,
    qkv_proj,
    relation_loss,
    rms_norm,
)

Call = tuple[str, Callable[[], object]]

_T = 1000


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _stats(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.float32)


def _ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return _meta(*shape, dtype=dtype)


def calls(dtype: torch.dtype, full: bool, optional: bool = True) -> Iterator[Call]:
    """(label, call) for one dtype of the activations; weights are fp32, as under autocast.

    Calls without optional arguments are among them if `full`, or in bf16 if `optional`.
    """
    yield from _norms(dtype, (128, 384, 768, 1024, 2048, 4096, 8192) if full else (768,), full)
    yield from _activations(dtype, (8, 384, 3072) if full else (3072,), full)
    yield from _losses(dtype, (2, 1000, 30522, 30528, 50265) if full else (30528,))
    yield from _embeddings(dtype, (384, 768, 1024) if full else (768,))
    yield from _products(dtype, (1, 64, 512, 8192) if full else (64,), full)
    if full or (optional and dtype == torch.bfloat16):
        yield from _optional(dtype)
    # AMD's backward of whole sequences takes up to 32 tokens
    lengths = (16, 32, 64, 128, 512) if full else (32, 512)
    for D in (32, 64, 128) if full else (64,):
        for S in lengths:
            for causal in (False, True) if full and D == 64 else (False,):
                for p in (0.0, 0.1) if full else (0.1,):
                    yield from _attention(dtype, S, D, causal, p)
    for S, form in ((512, "all"), (512, "rotary"), (128, "window bias"))[: 3 if full else 1]:
        for D in (64, 128) if full else (64,):
            for p in (0.0, 0.1) if full else (0.1,):
                yield from _attention(dtype, S, D, False, p, form)
    for S in (16, 32, 512) if full else (512,):
        for D, of_teacher in ((8, 16), (32, 64), (64, 64), (128, 128)) if full else ((32, 64),):
            yield from _relations(dtype, S, D, of_teacher)


def _norms(dtype: torch.dtype, widths: tuple[int, ...], full: bool) -> Iterator[Call]:
    seed, mean = _ids(1), _stats(_T)
    for C in widths:
        x, w = _meta(_T, C, dtype=dtype), _stats(C)
        yield f"layer_norm fwd C{C}", partial(layer_norm.forward, x, w, w, 1e-12)
        yield f"layer_norm bwd C{C}", partial(layer_norm.backward, x, x, w, mean, mean)
        yield f"rms_norm fwd C{C}", partial(rms_norm.forward, x, w, 1e-6)
        yield f"rms_norm bwd C{C}", partial(rms_norm.backward, x, x, w, mean)
        fused = dropout_add_layer_norm
        for p in (0.0, 0.1) if full else (0.1,):
            label = f"C{C} p{p}"
            forward = partial(fused.forward, x, x, w, w, 1e-12, p, seed, 3, None, True)
            backward = partial(fused.backward, x, x, w, mean, mean, p, seed, 3, None)
            yield f"dropout_add_layer_norm fwd {label}", forward
            yield f"dropout_add_layer_norm bwd {label}", backward
            yield f"dropout_add_layer_norm bwd {label} sum", partial(backward, None, x)


def _optional(dtype: torch.dtype) -> Iterator[Call]:
    """Calls without optional arguments: dropout, weights, biases, ids, types, numbers of rows, saving for backward."""
    x, w, ids, seed, mean = _meta(_T, 768, dtype=dtype), _stats(768), _ids(_T), _ids(1), _stats(_T)
    word, position, type_ = _stats(30522, 768), _stats(512, 768), _stats(2, 768)
    yield "layer_norm fwd plain", partial(layer_norm.forward, x, None, None, 1e-12)
    yield "layer_norm bwd plain", partial(layer_norm.backward, x, x, None, mean, mean)
    yield "layer_norm bwd from output", partial(layer_norm.backward, x, x, w, mean, mean, w)
    yield "rms_norm fwd plain", partial(rms_norm.forward, x, None, 1e-6)
    yield "rms_norm bwd plain", partial(rms_norm.backward, x, x, None, mean)
    fused = dropout_add_layer_norm
    unbiased = partial(fused.forward, x, x, w, None, 1e-12, 0.1, seed, 3, None, True)
    yield "dropout_add_layer_norm fwd no bias", unbiased
    for p, rows in ((0.0, None), (0.1, ids)):
        label, drop = f"p{p}{' rows' if p else ''}", (p, seed, 3, rows)
        yield (
            f"dropout_add_layer_norm fwd {label}",
            partial(fused.forward, x, x, w, w, 1e-12, *drop, False),
        )
        yield (
            f"dropout_add_layer_norm bwd {label}",
            partial(fused.backward, x, x, w, mean, mean, *drop),
        )
    yield (
        "dropout_add_layer_norm bwd from output",
        partial(fused.backward, x, x, w, mean, mean, 0.1, seed, 3, None, w),
    )
    yield "bias_gelu bwd no bias", partial(bias_gelu.backward, x, x, None, "none")
    tables = (ids, ids, ids, word, position, type_)
    ready = (_stats(_T, 768), ids, None, None, position, None)
    for name, inputs, p in (("p0.0", tables, 0.0), ("ready", ready, 0.1)):
        forward = partial(embed.forward, *inputs, w, w, 1e-12, p, seed, 0, dtype)
        yield f"embed fwd {name}", forward
        backward = partial(embed.backward, x, *inputs, w, mean, mean, p, seed, 0, None, None, True)
        yield f"embed bwd {name}", backward
    loss = partial(mlm_loss.forward, x, word, None, ids, None, -100, 8192, False)
    yield "mlm_loss fwd unsaved", loss
    few, w1, w2 = _meta(64, 768, dtype=dtype), _stats(3072, 768), _stats(768, 3072)
    unsaved = partial(feed_forward.forward, few, w1, None, w2, None, "none", False)
    yield "feed_forward fwd few unsaved", unsaved
    gated, halves = gated_feed_forward, [w1, w1]
    unsaved = partial(gated.forward, few, halves, [], w2, None, "gelu", False)
    yield "gated_feed_forward fwd few unsaved", unsaved
    u, needs = _meta(64, 6144, dtype=dtype), [True, True, False, False, False]
    yield (
        "gated_feed_forward bwd frozen",
        partial(gated.backward, few, few, u, halves, w2, "gelu", needs, w1.dtype),
    )
    integers = _meta(3072, 768, dtype=torch.int8)
    yield (
        "linear_int8 fwd 8 bits no bias",
        partial(linear_int8.forward, few, integers, _stats(3072), None, 8),
    )
    qkv, cu = _meta(_T, 3, 12, 64, dtype=dtype), _ids(9, dtype=torch.int32)
    yield (
        "attention fwd unsaved",
        partial(attention.forward, qkv, cu, 128, 0.125, 0.0, None, 0, *_form(12), False),
    )
    yield "relation_loss fwd unsaved", partial(relation_loss.forward, x, x, cu, 128, 12, False)


def _activations(dtype: torch.dtype, widths: tuple[int, ...], full: bool) -> Iterator[Call]:
    for F in widths:
        x, b = _meta(_T, F, dtype=dtype), _stats(F)
        for form in ("none", "tanh") if full else ("none",):
            yield f"bias_gelu fwd F{F} {form}", partial(bias_gelu.forward, x, b, form)
            yield f"bias_gelu bwd F{F} {form}", partial(bias_gelu.backward, x, x, b, form)
        yield from _gated(dtype, F, ("gelu", "gelu_tanh", "silu") if full else ("gelu",))


def _gated(dtype: torch.dtype, F: int, activations: tuple[str, ...]) -> Iterator[Call]:
    gated, C = gated_feed_forward, 64
    x, u, w2 = _meta(_T, C, dtype=dtype), _meta(_T, 2 * F, dtype=dtype), _stats(C, F)
    w1, b1, needs = [_stats(F, C), _stats(F, C)], [_stats(F), _stats(F)], [True] * 5
    for name in activations:
        forward = partial(gated.forward, x, w1, b1, w2, None, name, True)
        yield f"gated_feed_forward fwd F{F} {name}", forward
        backward = partial(gated.backward, x, x, u, w1, w2, name, needs, w2.dtype)
        yield f"gated_feed_forward bwd F{F} {name}", backward


def _losses(dtype: torch.dtype, sizes: tuple[int, ...]) -> Iterator[Call]:
    labels, row = _ids(_T), _stats(_T)
    for V in sizes:
        z = _meta(_T, V, dtype=dtype)
        yield f"cross_entropy fwd V{V}", partial(cross_entropy.forward, z, labels, -100)
        yield (
            f"cross_entropy bwd V{V}",
            partial(cross_entropy.backward, row, z, labels, row, -100),
        )
        h, w, b = _meta(_T, 64, dtype=dtype), _stats(V, 64), _stats(V)
        yield (
            f"mlm_loss fwd V{V}",
            partial(mlm_loss.forward, h, w, b, labels, None, -100, 8192, True),
        )
        inputs = (_stats(), h, w, b, labels, None, row, _meta(_T, loss_width(V), dtype=dtype))
        yield f"mlm_loss bwd V{V}", partial(mlm_loss.backward, *inputs, -100, 8192, [True] * 3)


def _embeddings(dtype: torch.dtype, widths: tuple[int, ...]) -> Iterator[Call]:
    ids, seed, mean = _ids(_T), _ids(1), _stats(_T)
    for C in widths:
        w, dy = _stats(C), _meta(_T, C, dtype=dtype)
        inputs = (ids, ids, ids, _stats(30522, C), _stats(512, C), _stats(2, C))
        forward = partial(embed.forward, *inputs, w, w, 1e-12, 0.1, seed, 0, dtype)
        backward = partial(embed.backward, dy, *inputs, w, mean, mean, 0.1, seed, 0, 0, None, True)
        yield f"embed fwd C{C}", forward
        yield f"embed bwd C{C}", backward


def _products(dtype: torch.dtype, rows: tuple[int, ...], full: bool) -> Iterator[Call]:
    weights, biases = [_stats(768, 768)] * 3, [_stats(768)] * 3
    w1, w2, b1, b2 = _stats(3072, 768), _stats(768, 3072), _stats(3072), _stats(768)
    for T in rows:
        x, u = _meta(T, 768, dtype=dtype), _meta(T, 3072, dtype=dtype)
        yield f"qkv_proj fwd T{T}", partial(qkv_proj.forward, x, weights, biases, 12)
        needs = [True] * 3
        yield f"linear bwd T{T}", partial(linear.backward, x, x, weights[0], needs, dtype)
        integers, scale = _meta(3072, 768, dtype=torch.int8), _stats(3072)
        for bits in (12, 8) if full else (12,):
            label = f"linear_int8 fwd T{T} {bits} bits"
            yield label, partial(linear_int8.forward, x, integers, scale, b1, bits)
        if not full:
            continue
        yield f"linear fwd T{T}", partial(linear.forward, x, weights[0], biases[0])
        yield (
            f"feed_forward fwd T{T}",
            partial(feed_forward.forward, x, w1, b1, w2, b2, "none", True),
        )
        yield (
            f"feed_forward bwd T{T}",
            partial(feed_forward.backward, x, x, u, w1, w2, "none", [True] * 5, w1.dtype),
        )


def _form(
    kv_heads: int,
    left: int = -1,
    right: int = -1,
    rotary: Tensor | None = None,
    pairs: bool = False,
    bias: Tensor | None = None,
) -> tuple[object, ...]:
    """Attention's arguments from `left` to `bias`."""
    return left, right, kv_heads, rotary, pairs, bias


def _forms(H: int, D: int) -> dict[str, dict[str, Any]]:
    """The names of attention's other forms, and their arguments."""
    window: dict[str, Any] = {"left": 64, "right": 64, "bias": _stats(H, 1023)}
    halves, pairs = _stats(512, 2, D // 2), _stats(512, 2, D // 4)
    return {
        "all": window | {"kv_heads": H // 3, "rotary": pairs, "pairs": True},
        "rotary": {"rotary": halves},
        "window bias": window,
    }


def _attention(
    dtype: torch.dtype, S: int, D: int, causal: bool, p: float, form: str = ""
) -> Iterator[Call]:
    H, B = 12, 8
    options: dict[str, Any] = {"kv_heads": H, "right": 0 if causal else -1}
    options |= _forms(H, D).get(form, {})
    heads = H + 2 * options["kv_heads"]
    qkv, cu = _meta(_T, heads, D, dtype=dtype), _ids(B + 1, dtype=torch.int32)
    out, lse, seed = _meta(_T, H, D, dtype=dtype), _stats(H, _T), _ids(1)
    rest = (cu, S, D**-0.5, p, seed, 1, *_form(**options))
    label = " ".join(filter(None, (f"S{S} D{D}", "causal" * causal, f"p{p}", form)))
    yield f"attention fwd {label}", partial(attention.forward, qkv, *rest, True)
    inputs, of_bias = (out, qkv, out, lse, *rest), "bias" in options
    yield f"attention bwd {label}", partial(attention.backward, *inputs, of_bias)


def _relations(dtype: torch.dtype, S: int, D: int, of_teacher: int) -> Iterator[Call]:
    H, B = 12, 8
    student, teacher = (_meta(_T, H * size, dtype=dtype) for size in (D, of_teacher))
    stats, cu = _stats(2, H, _T), _ids(B + 1, dtype=torch.int32)
    label = f"S{S} D{D} {of_teacher}"
    both = (student, teacher)
    yield f"relation_loss fwd {label}", partial(relation_loss.forward, *both, cu, S, H, True)
    yield (
        f"relation_loss bwd {label}",
        partial(relation_loss.backward, _stats(), *both, stats, stats, cu, S, H),
    )
