"""Ten pretraining steps with dropout: the default backends against the reference, twice, on one thread and on two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastbert.backend.cpu
from fastbert.bert import BertConfig, BertForPreTraining

LENGTHS = [48, 11, 30, 1, 23, 37]
SMALL = BertConfig(
    vocab_size=211,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=48,
)
# sizes at which every kernel, and stock's elementwise ops, use two threads; no size divides evenly
MANY_LENGTHS = [48, 11, 30, 1, 23, 37, 48, 35, 29, 48, 41, 7, 44, 48, 39, 46]
LARGE = BertConfig(
    vocab_size=1009,
    hidden_size=388,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=772,
    max_position_embeddings=48,
)
# relative error; measured 2e-7 in fp32 and 8e-5 in bf16, 3e-3 with other dropout bits (2 cores, AMD EPYC, 2026-11-25)
BUDGET = {torch.float32: 1e-5, torch.bfloat16: 5e-4}
DTYPES = pytest.mark.parametrize("dtype", list(BUDGET), ids=["fp32", "bf16"])


def batches(
    vocabulary: int = 211, lengths: list[int] = LENGTHS, labelled: float = 0.15
) -> Iterator[dict[str, Tensor]]:
    """Ten padded batches of sentence pairs, always the same; a share of the tokens is labelled."""
    generator = torch.Generator().manual_seed(5)
    mask = (torch.arange(48) < torch.tensor(lengths)[:, None]).long()
    for _ in range(10):
        ids = torch.randint(1, vocabulary, mask.shape, generator=generator)
        chosen = (torch.rand(mask.shape, generator=generator) < labelled) & (mask == 1)
        yield {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "token_type_ids": torch.randint(0, 2, mask.shape, generator=generator),
            "labels": ids.where(chosen, -100),
            "next_sentence_label": torch.randint(0, 2, (len(lengths),), generator=generator),
        }


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor | int]:
    """The packed form of a padded batch."""
    token = batch["attention_mask"] == 1
    lengths = token.sum(1)
    per_token = {k: batch[k][token] for k in ("input_ids", "token_type_ids", "labels")}
    return {
        **per_token,
        "next_sentence_label": batch["next_sentence_label"],
        "cu_seqlens": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen": int(lengths.max()),
    }


def train(
    config: BertConfig, given: Iterable[dict], dtype: torch.dtype, seed: int = 0
) -> Iterator[tuple[Tensor, BertForPreTraining]]:
    """(loss, model with its gradients) of each batch, before AdamW's step; `seed` is that of dropout."""
    torch.manual_seed(0)
    model = BertForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    for batch in given:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        yield loss.detach(), model
        optimizer.step()


def losses(dtype: torch.dtype, backend: str | None = None, seed: int = 0) -> Tensor:
    """The losses of ten steps from the same weights."""
    with fastbert.use(backend):
        return torch.stack([loss for loss, _ in train(SMALL, batches(), dtype, seed)])


def bits(dtype: torch.dtype, layout: str, threads: int) -> dict[str, Tensor]:
    """The loss and every gradient of each of three steps, and the parameters after them."""
    given = list(batches(LARGE.vocab_size, MANY_LENGTHS, labelled=0.25))[:3]
    if layout == "packed":
        given = [packed(batch) for batch in given]
    found = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i, (loss, model) in enumerate(train(LARGE, given, dtype)):
            found[f"loss {i}"] = loss
            for name, p in model.named_parameters():
                found[f"gradient {i} of {name}"] = p.grad.clone()
        return found | {name: p.detach() for name, p in model.named_parameters()}
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_default_backends_train_as_the_reference(dtype: torch.dtype) -> None:
    found, expected = losses(dtype), losses(dtype, "reference")
    torch.testing.assert_close(found, expected, rtol=BUDGET[dtype], atol=0.0)
    other = losses(dtype, seed=1)
    assert ((other - expected).abs() > 5 * BUDGET[dtype] * expected).any(), (
        "another seed of dropout changes no loss"
    )
    assert found[-1] < found[0]


@DTYPES
def test_two_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    assert torch.equal(losses(dtype), losses(dtype))


@DTYPES
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.skipif(
    fastbert.backend.cpu.native is None, reason=str(fastbert.backend.cpu.unavailable)
)
def test_one_thread_and_two(dtype: torch.dtype, layout: str) -> None:
    """Our kernels, and stock's elementwise ops (AdamW, tanh, the accumulation of gradients), give the same bits.

    Stock computes one sum, over the losses of the labelled rows. It splits it from 32,768 rows on (docs/cpu.md).
    """
    one, two = bits(dtype, layout, threads=1), bits(dtype, layout, threads=2)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
