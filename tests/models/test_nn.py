"""The drop-ins against torch.nn with the same state dict, and BERT's own blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert.nn as fnn
from fastbert.nn import watch

PADDING = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]) == 1
LEFT = PADDING.flip(1)
HOLES = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [0] * 7, [1, 1, 0, 1, 0, 1, 0]]) == 1
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)


@pytest.fixture(autouse=True)
def _forget_logged() -> None:
    watch._logged.clear()


def close(ours: Tensor, theirs: Tensor, what: str = "output") -> None:
    """Assert that the error is at most 1e-5 of the largest value."""
    scale = max(float(theirs.detach().abs().max()), 1e-6) if theirs.numel() else 1.0
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=1e-5 * scale, msg=lambda m: f"{what}: {m}"
    )


def twins(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """fastbert's module and torch.nn's with the same random state."""
    ours, theirs = getattr(fnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    assert isinstance(ours, getattr(nn, name))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    call: Callable[..., Tensor],
    x: Tensor,
    padding: Tensor | None = None,
) -> None:
    """Compare outputs and all gradients at tokens; at padding our output must be zero."""
    a, b = (x.clone().requires_grad_() for _ in range(2))
    y, z = call(ours, a), call(theirs, b)
    assert y.shape == z.shape
    token = torch.ones_like(z) if padding is None else (~padding[..., None]).expand_as(z)
    assert y[token == 0].eq(0).all()
    z = torch.where(token == 1, z, 0.0)
    close(y, z)
    dy = torch.randn_like(z)
    y.backward(dy)
    z.backward(dy)
    assert a.grad is not None
    assert b.grad is not None
    close(a.grad, b.grad, "gradient of the input")
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        close(p.grad, q.grad, f"gradient of {name}")


# --- LayerNorm, RMSNorm, GELU, CrossEntropyLoss ---


@pytest.mark.parametrize(
    ("kind", "shape", "kwargs"),
    [
        ("LayerNorm", 24, {}),
        ("LayerNorm", (3, 8), {}),
        ("LayerNorm", (2, 3, 8), {"eps": 1e-2}),
        ("LayerNorm", 24, {"bias": False}),
        ("LayerNorm", 24, {"elementwise_affine": False}),
        ("RMSNorm", 24, {}),
        ("RMSNorm", (2, 3, 8), {"eps": 1e-2, "elementwise_affine": False}),
    ],
)
def test_norms(kind: str, shape: Any, kwargs: dict[str, Any]) -> None:
    ours, theirs = twins(kind, shape, **kwargs)
    size = (5, 2, 24) if isinstance(shape, int) else (5, *shape)
    # rows far from zero, and rows as small as eps
    for x in (torch.randn(size) * 3 + 1, torch.randn(size) * 1e-4):
        compare(ours, theirs, lambda m, x: m(x), x)
    for m in (ours, theirs):  # torch.nn's own error
        with pytest.raises((RuntimeError, ValueError), match=r"normalized_shape|dimensions"):
            m(torch.randn(5, 23))


@pytest.mark.parametrize("columns", [1 << 20, 5_000_001])
def test_layer_norm_of_long_rows(columns: int) -> None:
    """Sums of millions of numbers are as exact as torch.nn's, forward and backward."""
    torch.manual_seed(0)
    x, dy = torch.rand(2, columns), torch.rand(2, columns)
    found = {}
    for name, m, dtype in (
        ("ours", fnn.LayerNorm(columns, elementwise_affine=False), torch.float32),
        ("torch", nn.LayerNorm(columns, elementwise_affine=False), torch.float32),
        ("exact", nn.LayerNorm(columns, elementwise_affine=False), torch.float64),
    ):
        leaf = x.detach().to(dtype).requires_grad_()
        y = m(leaf)
        y.backward(dy.to(dtype))
        found[name] = y.detach().double(), leaf.grad.double()
    for ours, theirs, exact in zip(*found.values(), strict=True):
        allowed = 2 * (theirs - exact).abs().max() + 4 * 2**-23 * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    ours, theirs = twins("GELU", approximate)
    compare(ours, theirs, lambda m, x: m(x), torch.randn(4, 3, 9) * 3)
    compare(ours, theirs, lambda m, x: m(x), torch.tensor(0.7))


N, V = 11, 7
IDS = torch.tensor([0, 3, -100, 6, 2, 2, -100, 1, 5, 4, 0])
LOSSES: dict[str, tuple[dict[str, Any], tuple[int, ...], Tensor, str | None]] = {
    "mean": ({}, (N, V), IDS, None),
    "sum": ({"reduction": "sum"}, (N, V), IDS, None),
    "none": ({"reduction": "none"}, (N, V), IDS, None),
    "ignore_index": ({"ignore_index": 2}, (N, V), IDS.clamp(min=0), None),
    "weight": ({"weight": torch.arange(1.0, V + 1)}, (N, V), IDS, "class weights"),
    "smoothing": ({"label_smoothing": 0.1}, (N, V), IDS, "label_smoothing is 0.1"),
    "dimensions": ({}, (N, V, 2), IDS[:, None].expand(N, 2), "3 dimensions"),
    "one": ({}, (V,), torch.tensor(3), "1 dimensions"),
    "probabilities": ({}, (N, V), torch.rand(N, V).softmax(1), "probabilities"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_cross_entropy(case: str, caplog: pytest.LogCaptureFixture) -> None:
    kwargs, shape, target, reason = LOSSES[case]
    ours, theirs = fnn.CrossEntropyLoss(**kwargs), nn.CrossEntropyLoss(**kwargs)
    with caplog.at_level(logging.INFO, logger="fastbert"):
        for _ in range(2):
            compare(ours, theirs, lambda m, x: m(x, target), torch.randn(shape) * 2)
    assert [reason in r.message for r in caplog.records] == ([True] if reason else [])


def test_cross_entropy_over_no_label_is_nan() -> None:
    ignored = torch.full((N,), -100)
    assert fnn.CrossEntropyLoss()(torch.randn(N, V), ignored).isnan()
    with pytest.raises(IndexError, match="labels"):
        fnn.CrossEntropyLoss()(torch.randn(N, V), IDS + 4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_has_the_dtype_of_torch(reduction: str) -> None:
    logits = torch.randn(N, V).bfloat16()
    pair = [k.CrossEntropyLoss(reduction=reduction) for k in (fnn, nn)]
    ours, theirs = (m(logits, IDS) for m in pair)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (m(logits, IDS) for m in pair)
    assert ours.dtype == theirs.dtype == torch.float32


# --- attention and encoders ---


@pytest.mark.parametrize(
    "padding", [None, PADDING, LEFT, HOLES], ids=["full", "right", "left", "holes"]
)
@pytest.mark.parametrize("causal", [False, True])
def test_multihead_attention(padding: Tensor | None, causal: bool) -> None:
    ours, theirs = twins("MultiheadAttention", 24, 3, batch_first=True)
    if causal and padding is not None and padding[:, 0].any():
        padding = PADDING  # torch.nn gives NaN where a query sees no key

    def call(m: nn.Module, x: Tensor) -> Tensor:
        mask = CAUSAL if causal else None
        hidden = padding if padding is None else padding.float().masked_fill(padding, float("-inf"))
        masks = [padding, hidden] if mask is None else [hidden]
        out = [
            m(x, x, x, k, need_weights=False, attn_mask=mask, is_causal=causal)[0] for k in masks
        ]
        close(out[0], out[-1], "float mask against boolean mask")
        return out[0]

    compare(ours, theirs, call, torch.randn(3, 7, 24), padding)


X = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
STOCK: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "weights": ({}, {"need_weights": True}, "pass need_weights=False"),
    "each": ({}, {"need_weights": True, "average_attn_weights": False}, "pass need_weights=False"),
    "mask": ({}, {"attn_mask": torch.randn(7, 7)}, "attn_mask is set"),
    "float": ({}, {"key_padding_mask": torch.randn(3, 7)}, "other values than 0 and -inf"),
    "cross": ({}, {"key": X + 1, "value": X + 1}, "not the same tensor"),
    "order": ({"batch_first": False}, {}, "pass batch_first=True"),
    "kdim": ({"kdim": 24, "vdim": 20}, {"key": X, "value": X[..., :20]}, "kdim or vdim"),
    "bias": ({"add_bias_kv": True}, {}, "add_bias_kv"),
    "zero": ({"add_zero_attn": True}, {}, "add_zero_attn"),
}


@pytest.mark.parametrize("case", STOCK)
def test_multihead_attention_falls_back(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """A call that the packed path can't run has torch.nn's result, and the log gives the reason once."""
    settings, call, reason = STOCK[case]
    ours, theirs = twins("MultiheadAttention", 24, 3, **{"batch_first": True, **settings})
    arguments = {"query": X, "key": X, "value": X, "need_weights": False, **call}
    with caplog.at_level(logging.INFO, logger="fastbert"):
        (y, weights), _ = ours(**arguments), ours(**arguments)
    z, expected = theirs(**arguments)
    assert torch.equal(y, z)
    assert (weights is None) == (expected is None)
    assert weights is None or torch.equal(weights, expected)
    if case != "kdim":
        assert [reason in r.message for r in caplog.records] == [True]


def test_wrong_masks_are_refused() -> None:
    m = fnn.MultiheadAttention(24, 3, batch_first=True)
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        m(X, X, X, PADDING[:, :6], need_weights=False)
    with pytest.raises(TypeError, match=r"key_padding_mask is torch\.int64: pass bool"):
        m(X, X, X, PADDING.long(), need_weights=False)


LAYER = {"d_model": 24, "nhead": 3, "dim_feedforward": 40, "batch_first": True}


@pytest.mark.parametrize("padding", [None, PADDING, HOLES], ids=["full", "right", "holes"])
@pytest.mark.parametrize(
    "activation", ["relu", "gelu", nn.GELU("tanh")], ids=["relu", "gelu", "tanh"]
)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_encoder_layer(norm_first: bool, activation: Any, padding: Tensor | None) -> None:
    settings = {**LAYER, "norm_first": norm_first, "activation": activation, "dropout": 0.0}
    ours, theirs = twins("TransformerEncoderLayer", **settings)
    compare(ours, theirs, lambda m, x: m(x, src_key_padding_mask=padding), X, padding)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_encoder_layer_without_biases_and_causal(norm_first: bool) -> None:
    settings = {
        **LAYER,
        "norm_first": norm_first,
        "activation": "gelu",
        "dropout": 0.0,
        "bias": False,
    }
    ours, theirs = twins("TransformerEncoderLayer", **settings)
    compare(ours, theirs, lambda m, x: m(x, CAUSAL, is_causal=True), X)


def encoders(final_norm: bool = False, **settings: Any) -> tuple[Any, Any]:
    """Two layers with different weights, ours and torch.nn's."""
    pair = []
    for module in (fnn, nn):
        torch.manual_seed(0)
        layer = module.TransformerEncoderLayer(**{**LAYER, "dropout": 0.0, **settings})
        norm = module.LayerNorm(24) if final_norm else None
        pair.append(module.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False))
    assert pair[0].state_dict().keys() == pair[1].state_dict().keys()
    with torch.no_grad():
        for p in pair[1].parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    pair[0].load_state_dict(pair[1].state_dict())
    return pair[0], pair[1]


@pytest.mark.parametrize("padding", [None, PADDING, LEFT], ids=["full", "right", "left"])
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder(
    activation: str, final_norm: bool, padding: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers give torch.nn's outputs and gradients; padding is removed once and put back once."""
    ours, theirs = encoders(final_norm, activation=activation, norm_first=final_norm)
    calls = []
    for name in ("pad", "unpad"):
        real = getattr(fnn.Packing, name)
        spy = lambda self, x, real=real, name=name: (calls.append(name), real(self, x))[1]  # noqa: E731
        monkeypatch.setattr(fnn.Packing, name, spy)
    compare(ours, theirs, lambda m, x: m(x, src_key_padding_mask=padding), X, padding)
    assert calls == ["unpad", "pad"]


def test_encoder_masks(caplog: pytest.LogCaptureFixture) -> None:
    """A causal mask is recognised in both dtypes. With another mask torch.nn's code runs, and the log says so."""
    ours, theirs = encoders()
    with caplog.at_level(logging.INFO, logger="fastbert"):
        compare(ours, theirs, lambda m, x: m(x, CAUSAL), X)
        compare(ours, theirs, lambda m, x: m(x, float("-inf") == CAUSAL), X)
        assert not caplog.records
        banded = CAUSAL.clone()
        banded[5, 0] = float("-inf")
        compare(ours, theirs, lambda m, x: m(x, banded), X)
        compare(ours, theirs, lambda m, x: m(x, CAUSAL, is_causal=False), X)
    reasons = [r.message for r in caplog.records]
    assert any("TransformerEncoder runs" in r and "not the causal one" in r for r in reasons)


class Doubled(nn.Linear):
    """A Linear that computes more than its weight and bias, like an adapter."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


FALLBACKS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "activation": ({"activation": nn.functional.silu}, lambda m: None, "neither GELU nor ReLU"),
    "order": ({"batch_first": False}, lambda m: None, "batch_first"),
    "hooks": ({}, lambda m: m.linear1.register_forward_hook(lambda *_: None), "hooks are attached"),
    "replaced": (
        {},
        lambda m: setattr(m, "linear2", nn.Sequential(m.linear2)),
        "a Linear was replaced by a Sequential",
    ),
    "adapter": (
        {},
        lambda m: setattr(m.linear1, "__class__", Doubled),
        "a Linear was replaced by a Doubled",
    ),
    "adapter of the attention": (
        {},
        lambda m: setattr(m.self_attn.out_proj, "__class__", Doubled),
        "was replaced by a Doubled",
    ),
    "norm": ({}, lambda m: setattr(m, "norm1", nn.Identity()), "a LayerNorm was replaced"),
    "dropout": ({}, lambda m: setattr(m, "dropout1", nn.Identity()), "a Dropout was replaced"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_encoder_layer_falls_back(case: str, caplog: pytest.LogCaptureFixture) -> None:
    settings, change, reason = FALLBACKS[case]
    ours, theirs = twins("TransformerEncoderLayer", **{**LAYER, "dropout": 0.0, **settings})
    for module in (ours, theirs):
        change(module)
    with caplog.at_level(logging.INFO, logger="fastbert"):
        compare(ours, theirs, lambda m, x: m(x), X)
    assert any(reason in r.message for r in caplog.records)


@pytest.mark.parametrize(
    "name", ["MultiheadAttention", "TransformerEncoderLayer", "TransformerEncoder"]
)
def test_dropout_follows_the_generator_and_the_mode(name: str) -> None:
    if name == "MultiheadAttention":
        m: Any = fnn.MultiheadAttention(24, 3, dropout=0.3, batch_first=True)
    else:
        m = fnn.TransformerEncoderLayer(**LAYER, dropout=0.3, activation="gelu")
        m = (
            m
            if name == "TransformerEncoderLayer"
            else fnn.TransformerEncoder(m, 2, enable_nested_tensor=False)
        )

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return (
            m(X, X, X, PADDING, False)[0] if name == "MultiheadAttention" else m(X, None, PADDING)
        )

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert run(0)[PADDING].eq(0).all()
    m.eval()
    assert torch.equal(run(0), run(1))


def test_dropout_keeps_the_mean() -> None:
    """Over many rows the mean output of a pre-norm layer with one dropout is its output without dropout."""
    m = fnn.TransformerEncoderLayer(**LAYER, dropout=0.0, activation="gelu", norm_first=True)
    m.dropout1.p = 0.5
    x = X[:1, :1].expand(600, 1, 24)
    with torch.no_grad():
        m.linear2.weight.zero_()  # the rest of the layer is linear in the dropped values
        m.linear2.bias.zero_()
        mean = m(x).mean(0)
        exact = m.eval()(x)[0]
        spread = (exact - x[0]).abs().max()
    assert (mean - exact).abs().max() < 0.25 * spread


def test_compile_without_a_break() -> None:
    """A drop-in without a mask is one graph."""
    for module in (
        fnn.LayerNorm((7, 24)),
        fnn.RMSNorm(24),
        fnn.GELU(),
        encoders(activation="gelu")[0].eval(),
    ):
        fast = torch.compile(module, backend="eager", fullgraph=True)
        close(fast(X), module(X))
    torch._dynamo.reset()
