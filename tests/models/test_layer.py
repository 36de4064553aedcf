"""The one encoder layer: every use of it agrees with the layer written out in stock operations."""

import pytest
import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.backend import cpu
from fastbert.backend.reference.philox import dropout
from fastbert.nn.blocks import PARAMETERS, EncoderLayer
from fastbert.nn.layer import (
    LayerCall,
    LayerSettings,
    LayerWeights,
    Rates,
    encoder_layer,
    feed_forward_block,
    parameters,
)

C, H, FFN = 24, 3, 40
BOUNDS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)


def weights(heads_width: int = C, bias: bool = True, up: int = 0) -> LayerWeights:
    """Random weights; `heads_width` is H * D, `up` the number of weights that a gated layer's `up` is, 0 without."""
    fields = LayerWeights(
        *(torch.randn(*s) * 0.2 for s in LayerWeights.shapes(C, heads_width, FFN))
    )
    fields = fields._replace(qkv=[fields.qkv], qkv_bias=[fields.qkv_bias])
    if up:
        matrices = list((torch.randn(2 * FFN, C) * 0.2).chunk(up))
        fields = fields._replace(up=matrices, up_bias=list(torch.randn(2 * FFN).chunk(up)))
    if bias:
        return fields
    return fields._replace(**{name: None for name in fields._fields if name.endswith("bias")})


def written_out(x: Tensor, w: LayerWeights, s: LayerSettings, c: LayerCall) -> Tensor:
    """The layer in stock operations, sequence by sequence, without dropout."""

    def norm(x, weight, bias, eps):
        return nn.functional.layer_norm(x, (C,), weight, bias, eps)

    def attention(x):
        bias = None if w.qkv_bias is None else torch.cat(w.qkv_bias)
        qkv = nn.functional.linear(x, torch.cat(w.qkv), bias)
        q, k, v = qkv.view(len(x), 3, s.heads, -1).permute(1, 2, 0, 3)
        scale = q.shape[-1] ** -0.5 if s.scale is None else s.scale
        out = torch.empty_like(q)
        for start, end in zip(c.cu_seqlens.tolist()[:-1], c.cu_seqlens.tolist()[1:], strict=True):
            scores = q[:, start:end] @ k[:, start:end].mT * scale
            if s.causal:
                scores = scores + torch.full_like(scores[0], float("-inf")).triu(1)
            out[:, start:end] = scores.softmax(-1) @ v[:, start:end]
        return nn.functional.linear(out.transpose(0, 1).flatten(1), w.out, w.out_bias)

    def feed_forward(x):
        act = {
            "gelu": nn.functional.gelu,
            "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
            "relu": torch.relu,
            "silu": nn.functional.silu,
        }.get(s.activation, s.activation)
        if s.gated:
            bias = None if w.up_bias is None else torch.cat(w.up_bias)
            a, g = nn.functional.linear(x, torch.cat(w.up), bias).chunk(2, -1)
            hidden = act(a) * g
        else:
            hidden = act(nn.functional.linear(x, w.up, w.up_bias))
        return nn.functional.linear(hidden, w.down, w.down_bias)

    first = (w.attention_norm, w.attention_norm_bias, s.attention_eps)
    second = (w.output_norm, w.output_norm_bias, s.output_eps)
    if s.pre_norm:
        x = x + attention(norm(x, *first))
        return x + feed_forward(norm(x, *second))
    x = norm(x + attention(x), *first)
    return norm(x + feed_forward(x), *second)


SETTINGS = {
    "bert": LayerSettings(H),
    "pre-norm": LayerSettings(H, pre_norm=True),
    "tanh": LayerSettings(H, "gelu_tanh", 1e-5, 1e-3),
    "relu": LayerSettings(H, "relu", scale=0.3),
    "function": LayerSettings(H, torch.nn.functional.silu),
    "silu": LayerSettings(H, "silu"),
    "causal": LayerSettings(H, causal=True),
    "gated": LayerSettings(H, pre_norm=True, gated=True),
    "gated-silu": LayerSettings(H, "silu", gated=True),
    "gated-relu": LayerSettings(H, "relu", gated=True),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("heads_width", [C, 12], ids=["whole", "pruned"])
@pytest.mark.parametrize("name", SETTINGS)
def test_written_out(name, heads_width, bias):
    s = SETTINGS[name]
    w = weights(heads_width, bias, up=(2 if s.activation == "silu" else 1) * s.gated)
    x, call = torch.randn(12, C), LayerCall(BOUNDS, 7)
    expected = written_out(x, w, s, call)
    torch.testing.assert_close(encoder_layer(x, w, s, call), expected, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([11, 0, 0, 5])
    found = encoder_layer(x, w, s, call._replace(rows=rows))
    torch.testing.assert_close(found, expected[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_modules_stand_in_the_place_of_weights(pre_norm):
    """Functions in the place of weights give the same results as the weights."""
    w, s = weights(), LayerSettings(H, pre_norm=pre_norm)
    call = LayerCall(BOUNDS, 7, torch.tensor([5]), 2)
    called = LayerWeights(
        qkv=lambda x: F.qkv_proj(x, w.qkv, w.qkv_bias, H),
        out=lambda x: F.linear(x, w.out, w.out_bias),
        attention_norm=lambda x: F.layer_norm(x, w.attention_norm, w.attention_norm_bias, 1e-12),
        up=lambda x: F.linear(x, w.up, w.up_bias),
        down=lambda x: F.linear(x, w.down, w.down_bias),
        output_norm=lambda x: F.layer_norm(x, w.output_norm, w.output_norm_bias, 1e-12),
    )
    x = torch.randn(12, C)
    for rates in (Rates(), Rates(0.1, 0.2, 0.3, 0.4)):
        s = s._replace(rates=rates)
        found, expected = (encoder_layer(x, each, s, call) for each in (called, w))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert parameters(called) is None
    assert [len(field) for field in parameters(w)] == [1] * 12


@pytest.mark.parametrize("up", [1, 2])
def test_modules_stand_in_the_place_of_gated_weights(up):
    """One function gives both halves, or each half has its own; inner dropout leaves the fused op too."""
    w, s = weights(up=up), LayerSettings(H, "silu", gated=True)
    x, call = torch.randn(12, C), LayerCall(BOUNDS, 7, torch.tensor([5]), 2)
    whole, bias = torch.cat(w.up), torch.cat(w.up_bias)
    one = w._replace(up=lambda x: F.linear(x, whole, bias), up_bias=None)
    pairs = list(zip(w.up, w.up_bias, strict=True))
    parts = [lambda x, p=p, b=b: F.linear(x, p, b) for p, b in pairs]
    for rates in (Rates(), Rates(inner=0.4)):
        s = s._replace(rates=rates)
        expected = feed_forward_block(x, w, s, call)
        for called in (one, w._replace(up=parts, up_bias=None)):
            found = feed_forward_block(x, called, s, call)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_sums_and_norms_are_one_pass(monkeypatch, pre_norm, bias):
    """Under autocast too, where the sum of a pre-norm layer's blocks stays in fp32."""
    calls, op = [], F.dropout_add_layer_norm
    monkeypatch.setattr(
        F, "dropout_add_layer_norm", lambda *a, **k: calls.append(k.get("p")) or op(*a, **k)
    )
    s = LayerSettings(H, pre_norm=pre_norm, rates=Rates(0.0, 0.1, 0.0, 0.2))
    call = LayerCall(BOUNDS, 7, torch.tensor([3]))
    x = torch.randn(12, C, requires_grad=True)
    y = encoder_layer(x, weights(bias=bias), s, call)
    y.sum().backward()
    assert calls == ([0.1] if pre_norm else [0.1, 0.2])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder_layer(x, weights(bias=bias), s, call)
    assert rounded.dtype == (torch.float32 if pre_norm else torch.bfloat16)


@pytest.mark.parametrize("inner_site", [False, True], ids=["three", "four"])
def test_dropout_sites(inner_site):
    """Each dropout uses the bits of its own site, by the row's number in the whole input."""
    w = weights()
    s = LayerSettings(H, "relu", rates=Rates(0, 0.5, 0, 0.25), inner_site=inner_site)
    call = LayerCall(BOUNDS, 7, torch.tensor([9]), 4)
    x = torch.randn(12, C)
    y = encoder_layer(x, w, s, call)
    qkv = F.qkv_proj(x, w.qkv, w.qkv_bias, H)
    attended = F.linear(F.attention(qkv, BOUNDS, 7).flatten(1), w.out, w.out_bias)
    z = x + dropout(attended, 0.5, call.seed, 5)
    z = F.layer_norm(z, w.attention_norm, w.attention_norm_bias, 1e-12)
    ff = F.linear(torch.relu(F.linear(z, w.up, w.up_bias)), w.down, w.down_bias)
    z = z + dropout(ff, 0.25, call.seed, 7 if inner_site else 6)
    z = F.layer_norm(z, w.output_norm, w.output_norm_bias, 1e-12)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([3, 11])
    torch.testing.assert_close(
        encoder_layer(x, w, s, call._replace(rows=rows)), y[rows], rtol=1e-4, atol=1e-4
    )


def test_the_order_of_the_fields_is_the_native_modules():
    if cpu.native is None:
        pytest.skip(str(cpu.unavailable))
    assert LayerWeights._fields == cpu.native.LAYER_FIELDS


def test_every_parameter_of_our_layer_has_a_field():
    layer = EncoderLayer(C, H, FFN)
    own = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert own == dict(zip(PARAMETERS, LayerWeights.shapes(C, C, FFN), strict=True))


def test_an_adapter_in_our_own_feed_forward_is_called():
    """A module in the place of a Linear is called; its weight alone is not enough."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return 2.0 * self.base(x)

    layer, x = EncoderLayer(C, H, FFN).eval(), torch.randn(12, C)
    up = layer.feed_forward.up
    layer.feed_forward.up = Adapted(up)
    found = layer(x, BOUNDS, 7)
    layer.feed_forward.up = up
    with torch.no_grad():
        up.weight.mul_(2.0)
        up.bias.mul_(2.0)
    torch.testing.assert_close(found, layer(x, BOUNDS, 7), rtol=1e-4, atol=1e-4)


def test_hooks_of_the_blocks_see_every_call():
    layer, seen = EncoderLayer(C, H, FFN).eval(), []
    for name in ("attention", "attention.qkv", "attention.out", "feed_forward", "feed_forward.up"):
        module = layer.get_submodule(name)
        module.register_forward_hook(lambda m, args, y, name=name: seen.append(name))
    layer(torch.randn(12, C), BOUNDS, 7)
    assert set(seen) == {
        "attention",
        "attention.qkv",
        "attention.out",
        "feed_forward",
        "feed_forward.up",
    }


@pytest.mark.parametrize("kind", ["hook", "subclass", "other"])
def test_a_norm_of_another_kind_is_called(kind):
    layer, x, calls = EncoderLayer(C, H, FFN).eval(), torch.randn(12, C), []
    before = layer(x, BOUNDS, 7)
    if kind == "hook":
        layer.output_norm.register_forward_hook(lambda m, args, y: calls.append(1) or 2.0 * y)
    elif kind == "subclass":

        class Doubled(nn.LayerNorm):
            def forward(self, x):
                return 2.0 * super().forward(x)

        layer.output_norm = Doubled(C, 1e-12)
    else:
        layer.output_norm = nn.RMSNorm(C)
    after = layer(x, BOUNDS, 7)
    if kind == "other":
        assert not torch.equal(after, before)
    else:
        torch.testing.assert_close(after, 2.0 * before, rtol=1e-4, atol=1e-4)
    assert len(calls) == (kind == "hook")
