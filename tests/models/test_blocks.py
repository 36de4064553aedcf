"""BERT's own blocks and the packing, on packed tokens."""

from __future__ import annotations

import pytest
import torch
from test_nn import HOLES, LEFT, PADDING, X, close
from torch import Tensor, nn

import fastbert.nn as fnn


@pytest.mark.parametrize("width", [8, 7, 1])
def test_sinusoidal_positions(width: int) -> None:
    """table[p, 2i] = sin(p / 10000^(2i / C)) and table[p, 2i + 1] = cos of the same, also for odd C."""
    table = fnn.sinusoidal_positions(50, width)
    assert table.shape == (50, width)
    for p in (0, 1, 49):
        for j in range(width):
            angle = torch.tensor(p / 10000 ** (2 * (j // 2) / width), dtype=torch.float64)
            assert abs(float(table[p, j]) - float(angle.cos() if j % 2 else angle.sin())) < 1e-6


@pytest.mark.parametrize("padding", [PADDING, LEFT, HOLES], ids=["right", "left", "holes"])
def test_packing_there_and_back(padding: Tensor) -> None:
    token = ~padding
    packing = fnn.Packing.from_mask(token.long())
    assert packing.cu_seqlens.tolist() == [0, *token.sum(1).cumsum(0).tolist()]
    assert packing.max_seqlen == int(token.sum(1).max())
    packed = packing.unpad(X)
    assert torch.equal(packed, X[token])
    assert torch.equal(packing.pad(packed), X * token[..., None])
    assert torch.equal(packing.positions(packed.shape[0]), token.nonzero()[:, 1])
    given = fnn.Packing.given(packing.cu_seqlens, packing.max_seqlen)
    offsets = torch.cat([torch.arange(int(n)) for n in token.sum(1)])
    assert torch.equal(given.positions(packed.shape[0]), offsets)
    assert torch.equal(given.first(packed), packing.first(packed))
    assert torch.equal(given.spread(packed)[1, : int(token[1].sum())], X[1][token[1]])


def test_packing_of_empty_rows_and_batches() -> None:
    mask = torch.tensor([[0, 0], [1, 1], [0, 0]])
    packing = fnn.Packing.from_mask(mask)
    x = torch.randn(2, 4)
    assert torch.equal(packing.first(x), torch.stack([torch.zeros(4), x[0], torch.zeros(4)]))
    assert fnn.Packing.from_mask(mask * 0).pad(x[:0]).eq(0).all()
    assert fnn.Packing.from_mask(mask[:0]).pad(x[:0]).shape == (0, 2, 4)
    with pytest.raises(ValueError, match="2 values that are neither 0 nor 1"):
        fnn.Packing.from_mask(mask * 5)
    with pytest.raises(ValueError, match="one value per token"):
        fnn.Packing.from_mask(mask[None])


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_gated_feed_forward(activation: str, bias: bool) -> None:
    """The block agrees with stock operations; an adapter in the place of `up` is called; hooks see its calls."""
    block, x = fnn.GatedFeedForward(24, 20, activation, bias), torch.randn(9, 24)
    assert block.up.weight.shape == (40, 24)
    act = {
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda a: nn.functional.gelu(a, approximate="tanh"),
        "silu": nn.functional.silu,
    }[activation]

    def stock() -> Tensor:
        a, g = nn.functional.linear(x, block.up.weight, block.up.bias).chunk(2, -1)
        return nn.functional.linear(act(a) * g, block.down.weight, block.down.bias)

    ours, theirs = block(x), stock()
    close(ours, theirs)
    params = list(block.parameters())
    assert len(params) == (4 if bias else 2)
    pair = (torch.autograd.grad(y.square().sum(), params) for y in (ours, theirs))
    for mine, stocks in zip(*pair, strict=True):
        close(mine, stocks)
    seen: list[int] = []
    block.up.register_forward_hook(lambda m, args, y: seen.append(1))
    close(block(x), theirs)
    assert seen == [1]
    assert block.state_dict().keys() >= {"up.weight", "down.weight"}


def test_a_gated_feed_forward_without_columns_is_its_last_bias() -> None:
    x = torch.randn(5, 8)
    assert fnn.GatedFeedForward(8, 0)(x).equal(torch.zeros(5, 8))
    block = fnn.GatedFeedForward(8, 0, bias=True)
    assert block(x).equal(block.down.bias.expand(5, -1))
    with pytest.raises(
        ValueError, match="activation is 'relu': choose one of gelu, gelu_tanh, silu"
    ):
        fnn.GatedFeedForward(8, 4, "relu")


def test_blocks_stand_alone() -> None:
    """Single blocks run on packed tokens, draw their own dropout, and agree with torch.nn's layer."""
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    layer = fnn.EncoderLayer(24, 3, 40, eps=1e-5)
    x = torch.randn(9, 24)
    assert not torch.equal(layer(x, cu_seqlens, 5), layer(x, cu_seqlens, 5))
    stock = nn.TransformerEncoderLayer(24, 3, 40, activation="gelu", batch_first=True).eval()
    parts = layer.state_dict()
    names = {
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj.": "attention.out.",
        "norm1.": "attention_norm.",
        "linear1.": "feed_forward.up.",
        "linear2.": "feed_forward.down.",
        "norm2.": "output_norm.",
    }
    state = {a + kind: parts[b + kind] for a, b in names.items() for kind in ("weight", "bias")}
    stock.load_state_dict(state)
    out = layer.eval()(x, cu_seqlens, 5)
    close(out[:4], stock(x[None, :4])[0])
    close(out[4:], stock(x[None, 4:])[0])
    with pytest.raises(ValueError, match="not divisible by num_heads"):
        fnn.QKVProjection(24, 5)
