"""Bytes that a training forward saves for its backward, per token and layer: ours beside transformers with SDPA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.models.works import LAYERS, OURS, STOCK
from fastbert.bert import BertConfig, BertModel
from fastbert.integrations.memory import saved_bytes

VOCABULARY = 100


def ours(layers: int) -> nn.Module:
    """Our BERT-base with this number of layers."""
    return BertModel(BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers))


def theirs(layers: int) -> nn.Module:
    """transformers' BERT-base with this number of layers."""
    import transformers

    config = transformers.BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers)
    config._attn_implementation = "sdpa"
    return transformers.BertModel(config)


def saved(model: nn.Module, lengths: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a forward with dropout saves; bf16 by autocast."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, VOCABULARY, mask.shape) * mask

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(ids, attention_mask=mask)

    return saved_bytes(forward, model.parameters())


def per_token_and_layer(
    build: Callable[[int], nn.Module], lengths: Sequence[int], dtype: torch.dtype
) -> tuple[float, float]:
    """Bytes per token of the padded batch: for one more layer, and on average over BERT-base's twelve with embeddings.

    The bytes of a batch are those that a second copy of it adds, so that autocast's copies of the weights do not count.
    """
    one, two = (
        saved(model, [*lengths, *lengths], dtype) - saved(model, lengths, dtype)
        for model in (build(1).train(), build(2).train())
    )
    tokens = max(lengths) * len(lengths)
    return (two - one) / tokens, (one + (LAYERS - 1) * (two - one)) / LAYERS / tokens


def against_stock(lengths: Sequence[int], precision: str) -> dict[str, float]:
    """The average over BERT-base's layers, of ours and of stock."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return {
        name: per_token_and_layer(build, lengths, dtype)[1]
        for name, build in ((OURS, ours), (STOCK, theirs))
    }
