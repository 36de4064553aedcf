"""Properties of the native ops over drawn shapes, layouts and dtypes, on every instruction set (hypothesis).

Drawn are sizes of 1, primes, sizes just below and above a vector, empty inputs and sequences, sequences of one token,
labels that are all ignored, fp32 weights beside bf16 x, strided and transposed inputs. Each example runs forward
and backward against the fp64 reference, with NaN around inputs and in fresh outputs.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbert import functional
from fastbert.backend import chooser, cpu
from fastbert.backend.reference.linear_int8 import quantize_weight
from fastbert.backend.reference.samples import Draw
from fastbert.testing import parity, poison
from fastbert.testing.budget import excess

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

# one below, at and above the vectors of 4, 8 and 16 lanes and the panels of 8, 16 and 32 columns
EDGES = sorted({width + d for width in (4, 8, 16, 32, 64) for d in (-1, 0, 1)})
SIZES = st.one_of(st.integers(1, 13), st.sampled_from(EDGES), st.integers(1, 140))
ROWS = st.one_of(st.just(0), st.just(1), st.integers(2, 45))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
LAYOUTS = st.sampled_from(["contiguous", "rows", "columns", "transposed"])
EXAMPLES = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _restore():
    """Leave the instruction set as it was."""
    before = cpu.native.isa()
    yield
    cpu.native.use_isa(before)


class Drawn:
    """Draws an example's tensors: one dtype for activations, one for weights, one layout for both."""

    def __init__(self, dtype: torch.dtype, mixed: bool, layout: str, seed: int) -> None:
        self._draw = Draw(dtype, seed=seed)
        self.weights = torch.float32 if mixed else dtype
        self.layout = layout

    def x(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """An activation."""
        return self._draw.normal(*shape, scale=scale, mean=mean)

    def w(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """A weight."""
        return self._draw.normal(*shape, scale=scale, mean=mean, dtype=self.weights)

    def vector(self, given: bool, n: int) -> Tensor | None:
        """A bias (n,) or None."""
        return self.w(n) if given else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._draw, name)


DRAWN = st.builds(Drawn, DTYPES, st.booleans(), LAYOUTS, st.integers(0, 1000))
FIRST = Drawn(torch.float32, False, "contiguous", 0)
PAIRS = Drawn(torch.bfloat16, True, "rows", 1)


def placed(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout; the memory around them is NaN, or the largest integer."""
    if layout == "contiguous" or t.dim() == 0 or t.numel() == 0:
        return poison.surround(t)
    if layout == "transposed":
        return poison.surround(t.movedim(0, -1).contiguous()).movedim(-1, 0)
    bad = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    *lead, last = t.shape
    wide = torch.full((*lead, 2 * last + 5), bad, dtype=t.dtype)
    view = wide[..., 3 : 3 + last] if layout == "rows" else wide[..., 1 : 1 + 2 * last : 2]
    return view.copy_(t)


def near(t: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """t in fp64, each element changed by a relative error of eps, as rounding may change it."""
    if not t.is_floating_point():
        return t
    sign = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
    return t.double() * (1 + eps * sign)


def gradient(y: Tensor) -> Tensor:
    """An upstream gradient that every dtype holds exactly."""
    return parity.upstream(y).bfloat16()


def call(op: Any, kwargs: dict[str, Any], change: Any, backward: bool) -> parity.Results:
    """Outputs and gradients of the op, after `change` of every tensor among its arguments."""
    changed = {key: parity.tree_map(value, change) for key, value in kwargs.items()}
    return parity.call(op, changed, backward, gradient)


def check(slug: str, kwargs: dict[str, Any], d: Drawn, backward: bool = True) -> None:
    """Every instruction set keeps the error budget.

    Plain PyTorch may compute an output of few elements without any error, by luck. So the effect of rounded inputs on
    the exact result is allowed too.
    """
    op, eager = (
        getattr(functional, slug),
        importlib.import_module(f"fastbert.backend.reference.{slug}").eager,
    )
    generator, eps = torch.Generator().manual_seed(1), torch.finfo(d.dtype).eps / 2
    granted = [call(eager, kwargs, lambda t: t, backward)]
    with chooser.use("reference"):
        truth = call(op, kwargs, lambda t: near(t, 0.0, generator), backward)
        for _ in range(2):
            granted.append(call(op, kwargs, lambda t: near(t, eps, generator), backward))
    for isa in cpu.native.isas():
        cpu.native.use_isa(isa)
        with chooser.use("cpu"), poison.outputs():
            ours = call(op, kwargs, lambda t: placed(t, d.layout), backward)
        for key, expected in truth.items():
            found = [excess(ours[key], expected, e[key]) for e in granted]
            if expected.numel() < 8:
                # the rms of so few errors is near their maximum, which may be 4 eps
                found = [None if f and f.startswith("rms") else f for f in found]
            assert None in found, f"{slug} {isa} {key}: {found[0]}"


def dropout(d: Drawn, p: float, site: int = 3) -> dict[str, Any]:
    """The arguments of dropout, none for p = 0."""
    return {"p": p, "seed": d.seed(), "site": site} if p else {}


P = st.sampled_from([0.0, 0.25])
# at so few columns the normalised values hardly depend on the input: the exact gradient is 0, or due to eps alone, and
# the computed one is rounding error
FLAT = 2


@EXAMPLES
@given(DRAWN, ROWS, SIZES, SIZES, st.booleans())
# K just beyond one piece of the GEMM: 256 and 3072 steps, of one fp32 value or of a pair of bf16 values
@example(FIRST, 29, 257, 3, True)
@example(PAIRS, 29, 513, 3, True)
@example(FIRST, 3, 3073, 5, False)
@example(PAIRS, 3, 6147, 5, False)
# several blocks of rows and of columns
@example(FIRST, 101, 9, 197, True)
def test_linear(d: Drawn, T: int, K: int, N: int, bias: bool) -> None:
    kwargs = {"x": d.x(T, K), "weight": d.w(N, K, scale=K**-0.5), "bias": d.vector(bias, N)}
    check("linear", kwargs, d)


@EXAMPLES
@given(DRAWN, ROWS, SIZES, SIZES, st.booleans(), st.sampled_from([12, 8]))
# K just beyond one piece of the GEMM, in pairs, and several blocks
@example(FIRST, 29, 1537, 3, True, 12)
@example(PAIRS, 3, 6145, 5, False, 12)
@example(FIRST, 101, 9, 197, True, 8)
def test_linear_int8(d: Drawn, T: int, K: int, N: int, bias: bool, bits: int) -> None:
    weight, scale = quantize_weight(d.w(N, K, scale=K**-0.5))
    kwargs = {"x": d.x(T, K), "weight": weight, "scale": scale, "bias": d.vector(bias, N)}
    check("linear_int8", {**kwargs, "bits": bits}, d)


@EXAMPLES
@given(
    DRAWN,
    ROWS,
    SIZES,
    st.integers(1, 3),
    st.integers(1, 17),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_qkv_proj(d: Drawn, T: int, C: int, H: int, D: int, pieces: int, bias: bool) -> None:
    rows = 3 * H * D // pieces
    kwargs = {
        "x": d.x(T, C),
        "weights": [d.w(rows, C, scale=C**-0.5) for _ in range(pieces)],
        "biases": [d.w(rows) for _ in range(pieces)] if bias else None,
        "num_heads": H,
    }
    check("qkv_proj", kwargs, d)


LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.sampled_from(EDGES)), max_size=4)
HEAD_SIZES = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 127, 128]))


@EXAMPLES
@given(DRAWN, LENGTHS, st.integers(1, 3), HEAD_SIZES, P, st.booleans(), st.integers(0, 3))
# more keys than a block of scores holds, and sequences of one token only
@example(FIRST, [700], 1, 3, 0.25, True, 0)
@example(PAIRS, [1, 1, 0, 1], 2, 5, 0.25, False, 2)
# a shorter sequence needs more working memory than the longest one: its blocks have more queries
@example(FIRST, [545, 544, 548, 544, 657, 656, 660, 656, 668, 664], 1, 8, 0.25, False, 0)
def test_attention(
    d: Drawn, lengths: list[int], H: int, D: int, p: float, causal: bool, tail: int
) -> None:
    qkv = d.x(sum(lengths) + tail, 3, H, D)
    qkv[sum(lengths) :] = float("nan")
    kwargs = {
        "qkv": qkv,
        "cu_seqlens": d.cu_seqlens(*lengths),
        "max_seqlen": max(lengths, default=0),
        "causal": causal,
    }
    check("attention", kwargs | dropout(d, p), d)


@EXAMPLES
@given(DRAWN, LENGTHS, st.integers(1, 3), HEAD_SIZES, HEAD_SIZES, st.integers(0, 3))
# more keys than a block of scores holds and than a slice of a sum, heads wider than a slice
@example(FIRST, [700], 1, 3, 5, 0)
@example(PAIRS, [1, 1, 0, 1], 2, 5, 4, 2)
@example(FIRST, [19], 1, 300, 257, 0)
# a shorter sequence needs more working memory than the longest one: its blocks have more rows
@example(FIRST, [545, 544, 656, 664], 1, 8, 4, 0)
def test_relation_loss(
    d: Drawn, lengths: list[int], H: int, D: int, of_teacher: int, tail: int
) -> None:
    T = sum(lengths)
    # scores of a standard deviation of 1 off the diagonal, and about 2 on it
    student, teacher = (
        d.x(T + tail, H * size, scale=min(1.0, 2.0**0.5 * size**-0.25)) for size in (D, of_teacher)
    )
    student[T:], teacher[T:] = float("nan"), float("nan")
    kwargs = {
        "student": student,
        "teacher": teacher,
        "cu_seqlens": d.cu_seqlens(*lengths),
        "max_seqlen": max(lengths, default=0),
        "num_heads": H,
    }
    check("relation_loss", kwargs, d)


@EXAMPLES
@given(DRAWN, LENGTHS, st.integers(1, 40), st.integers(1, 2), st.booleans(), st.integers(0, 3))
# units of more than one slice of a sum, more sequences than rows of a tile
@example(FIRST, [3, 1], 260, 1, False, 0)
@example(PAIRS, [2, 0, 3, 1, 2, 2, 1, 4, 1, 2, 3, 1, 1, 2, 5, 1], 9, 2, True, 1)
def test_lstm(d: Drawn, lengths: list[int], H: int, D: int, states: bool, tail: int) -> None:
    lengths = [min(n, 9) for n in lengths]
    gates = d.x(sum(lengths) + tail, D * 4 * H)
    gates[sum(lengths) :] = float("nan")
    kwargs = {"gates": gates, "weights": [d.x(4 * H, H, scale=H**-0.5) for _ in range(D)]}
    kwargs |= {"cu_seqlens": d.cu_seqlens(*lengths), "max_seqlen": max(lengths, default=0)}
    if states:
        kwargs |= {name: d.x(D, len(lengths), H) for name in ("h0", "c0")}
    check("lstm", kwargs, d)


@EXAMPLES
@given(DRAWN, ROWS, SIZES, st.booleans(), st.booleans(), st.sampled_from([0.0, 20.0]))
@example(FIRST, 3, 1, True, True, 0.0)
def test_layer_norm(d: Drawn, N: int, C: int, weight: bool, bias: bool, mean: float) -> None:
    kwargs = {"x": d.x(N, C, mean=mean), "weight": d.vector(weight, C)}
    kwargs["bias"] = d.vector(weight and bias, C)
    check("layer_norm", kwargs, d, C > FLAT)


@EXAMPLES
@given(DRAWN, ROWS, SIZES, st.booleans(), st.sampled_from([0.0, 20.0]))
@example(FIRST, 3, 1, True, 0.0)
def test_rms_norm(d: Drawn, N: int, C: int, weight: bool, mean: float) -> None:
    kwargs = {"x": d.x(N, C, mean=mean), "weight": d.vector(weight, C), "eps": 1e-6}
    check("rms_norm", kwargs, d, C > FLAT)


@EXAMPLES
@given(DRAWN, ROWS, SIZES, P, st.booleans(), st.booleans(), st.booleans())
def test_dropout_add_layer_norm(
    d: Drawn, N: int, C: int, p: float, compacted: bool, bias: bool, both: bool
) -> None:
    kwargs = {"x": d.x(N, C), "residual": d.x(N, C), "weight": d.w(C), "return_sum": both}
    kwargs["bias"] = d.vector(bias, C)
    if compacted and p:
        kwargs["rows"] = d.ids(2**32, N)
    check("dropout_add_layer_norm", kwargs | dropout(d, p), d, C > FLAT)


@EXAMPLES
@given(
    DRAWN,
    ROWS,
    SIZES,
    st.booleans(),
    st.sampled_from(["none", "tanh"]),
    st.sampled_from([1.0, 8.0]),
)
def test_bias_gelu(d: Drawn, N: int, F: int, bias: bool, approximate: str, scale: float) -> None:
    kwargs = {"x": d.x(N, F, scale=scale), "bias": d.vector(bias, F), "approximate": approximate}
    check("bias_gelu", kwargs, d)


@EXAMPLES
@given(DRAWN, ROWS, SIZES, SIZES, st.booleans(), st.sampled_from(["none", "tanh"]))
def test_feed_forward(d: Drawn, T: int, C: int, F: int, bias: bool, approximate: str) -> None:
    kwargs = {
        "x": d.x(T, C),
        "w1": d.w(F, C, scale=C**-0.5),
        "b1": d.vector(bias, F),
        "w2": d.w(C, F, scale=F**-0.5),
        "b2": d.vector(bias, C),
        "approximate": approximate,
    }
    check("feed_forward", kwargs, d)


@EXAMPLES
@given(
    DRAWN,
    ROWS,
    SIZES,
    SIZES,
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from(["gelu", "gelu_tanh", "silu"]),
)
# K beyond one pass, and several blocks of rows and of columns
@example(FIRST, 3, 3073, 9, 2, False, "silu")
@example(PAIRS, 3, 6147, 9, 1, True, "gelu")
@example(FIRST, 101, 9, 197, 2, True, "silu")
def test_gated_feed_forward(
    d: Drawn, T: int, C: int, F: int, pieces: int, bias: bool, activation: str
) -> None:
    rows = 2 * F // pieces
    kwargs = {
        "x": d.x(T, C),
        "w1": [d.w(rows, C, scale=C**-0.5) for _ in range(pieces)],
        "b1": [d.w(rows) for _ in range(pieces)] if bias else None,
        "w2": d.w(C, F, scale=F**-0.5),
        "b2": d.vector(bias, C),
        "activation": activation,
    }
    check("gated_feed_forward", kwargs, d)


@EXAMPLES
@given(DRAWN, ROWS, SIZES, st.integers(1, 40), st.sampled_from([0, 1, 2]), P, st.booleans())
def test_embed(d: Drawn, T: int, C: int, V: int, Y: int, p: float, padding: bool) -> None:
    d.weights = d.dtype  # the three tables are of one dtype
    kwargs = {
        "ids": d.ids(V, T),
        "positions": d.ids(7, T),
        "types": d.ids(Y, T) if Y else None,
        "word": d.x(V, C),
        "position": d.x(7, C),
        "type_": d.x(Y, C) if Y else None,
        "weight": d.w(C, mean=1.0, scale=0.2),
        "bias": d.w(C),
        "padding_idx": 0 if padding else None,
    }
    check("embed", kwargs | dropout(d, p), d, C > FLAT)


FILL = st.sampled_from([0.0, 0.3, 1.0])


@EXAMPLES
@given(
    DRAWN, ROWS, SIZES, FILL, st.sampled_from(["mean", "sum", "none"]), st.sampled_from([1.0, 30.0])
)
# the kernel reads logits in blocks of 1024
@example(FIRST, 3, 1025, 1.0, "sum", 1.0)
@example(PAIRS, 3, 2047, 0.3, "none", 30.0)
def test_cross_entropy(d: Drawn, N: int, V: int, fill: float, reduction: str, scale: float) -> None:
    kwargs = {"logits": d.x(N, V, scale=scale), "labels": d.labels(V, N, fill)}
    check("cross_entropy", kwargs | {"reduction": reduction}, d)


@EXAMPLES
@given(DRAWN, ROWS, SIZES, SIZES, FILL, st.booleans(), st.sampled_from([None, 1, 3]))
def test_mlm_loss(
    d: Drawn, T: int, C: int, V: int, fill: float, bias: bool, max_rows: int | None
) -> None:
    kwargs = {
        "hidden": d.x(T, C),
        "weight": d.w(V, C, scale=C**-0.5),
        "bias": d.vector(bias, V),
        "labels": d.labels(V, T, fill),
        "max_rows": max_rows,
    }
    check("mlm_loss", kwargs, d)
