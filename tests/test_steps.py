"""Ten pretraining steps with dropout: the default backends against the reference, twice, on one thread and on two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert.bert import BertConfig, BertForPreTraining

LENGTHS = [48, 11, 30, 1, 23, 37]
# relative: rounding made 2e-7 in fp32 and 8e-5 in bf16, other dropout bits 3e-3 (2 cores of an AMD EPYC, 2026-11-25)
BUDGET = {torch.float32: 1e-5, torch.bfloat16: 5e-4}
DTYPES = pytest.mark.parametrize("dtype", list(BUDGET), ids=["fp32", "bf16"])


def batches() -> Iterator[dict[str, Tensor]]:
    """The same ten padded batches of sentence pairs, 15 % of their tokens labelled."""
    generator = torch.Generator().manual_seed(5)
    mask = (torch.arange(48) < torch.tensor(LENGTHS)[:, None]).long()
    for _ in range(10):
        ids = torch.randint(1, 211, mask.shape, generator=generator)
        chosen = (torch.rand(mask.shape, generator=generator) < 0.15) & (mask == 1)
        yield {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "token_type_ids": torch.randint(0, 2, mask.shape, generator=generator),
            "labels": ids.where(chosen, -100),
            "next_sentence_label": torch.randint(0, 2, (len(LENGTHS),), generator=generator),
        }


def losses(
    dtype: torch.dtype, backend: str | None = None, threads: int = 1, seed: int = 0
) -> Tensor:
    """The losses of ten AdamW steps from the same weights; `seed` is the dropout's."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=211,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=48,
    )
    model = BertForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    found = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with fastbert.use(backend):
            for batch in batches():
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.detach())
    finally:
        torch.set_num_threads(before)
    return torch.stack(found)


@DTYPES
def test_default_backends_train_as_the_reference(dtype: torch.dtype) -> None:
    found, expected = losses(dtype), losses(dtype, "reference")
    torch.testing.assert_close(found, expected, rtol=BUDGET[dtype], atol=0.0)
    other = losses(dtype, seed=1)
    assert ((other - expected).abs() > 5 * BUDGET[dtype] * expected).any(), (
        "dropout changes nothing"
    )
    assert found[-1] < found[0]


@DTYPES
def test_two_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    assert torch.equal(losses(dtype), losses(dtype))


@DTYPES
def test_one_thread_and_two(dtype: torch.dtype) -> None:
    """Stock GEMMs may add in another order on two threads: only with none of them left can this be bitwise."""
    found = losses(dtype, threads=2)
    torch.testing.assert_close(found, losses(dtype), rtol=BUDGET[dtype], atol=0.0)
    assert torch.equal(found, losses(dtype, threads=2))
