"""A whole BERT-base against transformers (SDPA) from the same weights: training and inference, real lengths and full.

`make bench` runs it; it writes benchmarks/results/bert.json, of which `python benchmarks/readme.py` makes README's
table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastbert.bert import BertForPreTraining
from fastbert.testing.machine import machine_info
from fastbert.testing.timing import interleave

RESULTS = Path(__file__).parent / "results" / "bert.json"
LENGTHS = {"real": (128, 30, 45, 22, 80, 17, 60, 33), "full": (128,) * 8}
ROUNDS = {"train": 5, "infer": 9}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """transformers' BERT-base and ours, from the same random weights."""
    transformers.set_seed(0)
    stock = transformers.BertForPreTraining(transformers.BertConfig())
    folder = tmp_path_factory.mktemp("bert-base")
    stock.save_pretrained(folder)
    return stock, BertForPreTraining.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows():
    """The table's rows; what was measured is written when the last one is done."""
    table: list[dict[str, Any]] = []
    yield table
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine_info(), "rows": table}, indent=1) + "\n")


def batch(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random ids of these lengths, padded, 15 % of the tokens labelled."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(1000, 30000, shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    labelled = (torch.rand(shape, generator=generator) < 0.15) & mask.bool()
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
        "labels": ids.where(labelled, -100),
        "next_sentence_label": torch.arange(len(lengths)) % 2,
    }


def stepper(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], autocast: Callable
) -> Callable:
    """One training step: forward with dropout, backward, fused AdamW at a rate that leaves the weights as they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        model.train()
        with autocast():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inferer(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], autocast: Callable
) -> Callable:
    """The encoder's last hidden state."""
    encoder = model.bert
    inputs = {k: v for k, v in inputs.items() if "label" not in k}

    def infer() -> torch.Tensor:
        model.eval()
        with torch.inference_mode(), autocast():
            return encoder(**inputs).last_hidden_state

    return infer


def check(work: str, models: tuple, inputs: dict[str, torch.Tensor], autocast: Callable) -> float:
    """Refuse to time a wrong model: losses within 1 %, hidden states at cosine >= .9999; returns the agreement."""
    stock, ours = models
    if work == "train":
        losses = []
        for model in (stock.eval(), ours.eval()):
            with torch.no_grad(), autocast():
                losses.append(float(model(**inputs).loss))
        assert abs(losses[0] - losses[1]) < 1e-2 * losses[0]
        return 1 - abs(losses[0] - losses[1]) / losses[0]
    token = inputs["attention_mask"].bool()
    a, b = (inferer(m, inputs, autocast)().float()[token].flatten() for m in (stock, ours))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    assert cosine >= 0.9999
    return cosine


@pytest.mark.parametrize("fill", ["real", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("work", ["train", "infer"])
def test_bert(benchmark, models, rows, work, precision, fill):
    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    inputs = batch(LENGTHS[fill])
    agreement = check(work, models, inputs, autocast)
    make = stepper if work == "train" else inferer
    competitors = {
        name: make(model, inputs, autocast)
        for name, model in zip(("transformers", "fastbert"), models, strict=True)
    }
    times = interleave(competitors, rounds=ROUNDS[work], warmup=1)
    stock, ours = times["transformers"], times["fastbert"]
    row = {
        "work": work,
        "precision": precision,
        "fill": fill,
        "ratio": stock.median / ours.median,
        "ratio_low": stock.p20 / ours.p80,
        "ratio_high": stock.p80 / ours.p20,
        "agreement": agreement,
        "seconds": {name: vars(t) for name, t in times.items()},
    }
    rows.append(row)
    benchmark.extra_info.update(row)
    # pytest-benchmark stores the run; the comparison is the interleaved one above
    benchmark.pedantic(competitors["fastbert"], rounds=1)
