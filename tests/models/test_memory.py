"""Bytes saved for backward per token and layer: at most half of those of transformers with SDPA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.models.saved import against_stock, ours, per_token_and_layer, theirs
from benchmarks.models.works import REAL
from fastbert.integrations.memory import saved_bytes

BUILDS = {"fastbert": ours, "sdpa": theirs}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def test_counts_each_storage_once_and_no_parameter() -> None:
    x, w = torch.randn(5, 3), torch.randn(3, 3, requires_grad=True)

    def forward() -> Tensor:
        y = x @ w  # saves x
        return y.exp() * y.exp().view(
            5, 3
        )  # saves both results of exp, for exp and for the product

    assert saved_bytes(forward) == 3 * x.nbytes
    assert saved_bytes(forward, [x]) == 2 * x.nbytes
    assert saved_bytes(lambda: (x.clone() @ w)[:1] * w[:1], [w]) == 2 * x.nbytes


@DTYPES
def test_saves_at_most_half_of_stock(dtype: torch.dtype) -> None:
    """Two full sequences are enough, since the bytes are proportional to the batch; pytest -s prints them."""
    stock = per_token_and_layer(theirs, [128] * 2, dtype)
    full = per_token_and_layer(ours, [128] * 2, dtype)
    real = per_token_and_layer(ours, REAL, dtype)
    for i, what in enumerate(("one more layer", "average of BERT-base")):
        print(
            f"\n{dtype}, {what}, bytes per token: transformers {stock[i]:.0f}, full {full[i]:.0f} "
            f"({full[i] / stock[i]:.2%}), 41 % real {real[i]:.0f} ({real[i] / stock[i]:.2%})"
        )
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    # the function behind the README's figures, on a small batch
    few = {name: per_token_and_layer(build, [8], dtype)[1] for name, build in BUILDS.items()}
    assert against_stock([8], precision) == few
    assert full[1] <= 0.5 * stock[1]
    assert real[1] <= 0.25 * stock[1]


@DTYPES
def test_norms_from_output_save_two_rows_a_layer(dtype: torch.dtype) -> None:
    """The gradients agree; the bytes saved are fewer by two sums of each layer."""
    from fastbert.bert import BertForMaskedLM
    from fastbert.models.config import BertConfig

    torch.manual_seed(0)
    layers, tokens, width = 2, 24, 64
    config = BertConfig(
        vocab_size=90,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=128,
    )
    model = BertForMaskedLM(config).train()
    ids = torch.randint(90, (2, tokens // 2))
    saved, gradients = [], []
    for on in (False, True):
        model.norms_from_output(on)
        torch.manual_seed(1)
        model.zero_grad()

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return model(ids, labels=ids).loss

        saved.append(saved_bytes(forward, model.parameters()))
        torch.manual_seed(1)
        forward().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert saved[0] - saved[1] == 2 * layers * tokens * width * dtype.itemsize
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)
