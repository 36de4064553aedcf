"""What is saved for backward, per token and layer, against transformers with SDPA: at most half of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastbert.bert import BertConfig, BertModel
from fastbert.testing.memory import saved_bytes

LENGTHS = [128, 30, 45, 22, 80, 17, 60, 33]  # 41 % of 8 x 128
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def test_counts_each_storage_once_and_no_parameter() -> None:
    x, w = torch.randn(5, 3), torch.randn(3, 3, requires_grad=True)

    def forward() -> Tensor:
        y = x @ w  # saves x
        return y.exp() * y.exp().view(
            5, 3
        )  # saves both results of exp, each for exp and for the product

    assert saved_bytes(forward) == 3 * x.nbytes
    assert saved_bytes(forward, [x]) == 2 * x.nbytes
    assert saved_bytes(lambda: (x.clone() @ w)[:1] * w[:1], [w]) == 2 * x.nbytes


def ours(layers: int) -> nn.Module:
    return BertModel(BertConfig(vocab_size=100, num_hidden_layers=layers))


def theirs(layers: int) -> nn.Module:
    config = transformers.BertConfig(vocab_size=100, num_hidden_layers=layers)
    config._attn_implementation = "sdpa"
    return transformers.BertModel(config)


def saved(model: nn.Module, lengths: list[int], dtype: torch.dtype) -> int:
    """Bytes that a training forward of BERT-base's width saves, dropout on."""
    mask = (torch.arange(128) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 100, mask.shape) * mask

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(ids, attention_mask=mask)

    return saved_bytes(forward, model.parameters())


def per_token_and_layer(build: Any, lengths: list[int], dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per token of the padded batch: for one more layer, and on average over BERT-base's twelve with embeddings.

    A batch is counted as what doubling it adds: the weights that autocast keeps a cast copy of do not count.
    """
    one, two = (
        saved(model, lengths * 2, dtype) - saved(model, lengths, dtype)
        for model in (build(1).train(), build(2).train())
    )
    tokens = 128 * len(lengths)
    return (two - one) / tokens, (one + 11 * (two - one)) / 12 / tokens


@DTYPES
def test_saves_at_most_half_of_stock(dtype: torch.dtype) -> None:
    """Counted on two full sequences, since bytes only grow with the batch; pytest -s prints the figures."""
    stock = per_token_and_layer(theirs, [128] * 2, dtype)
    full = per_token_and_layer(ours, [128] * 2, dtype)
    real = per_token_and_layer(ours, LENGTHS, dtype)
    for i, what in enumerate(("one more layer", "average of BERT-base")):
        print(
            f"\n{dtype}, {what}, bytes per token: transformers {stock[i]:.0f}, full {full[i]:.0f} "
            f"({full[i] / stock[i]:.2%}), 41 % real {real[i]:.0f} ({real[i] / stock[i]:.2%})"
        )
    assert full[1] <= 0.5 * stock[1]
    assert real[1] <= 0.25 * stock[1]
