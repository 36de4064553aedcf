"""Accelerated models under torch's exporters, without restore(): transformers' own code and plain torch operations."""

from __future__ import annotations

import copy

import pytest
import torch
from exporting import MASK, ONNX, OTHER, agree, batch, exported, onnx, traced
from hf_models import OLD, build

import fastbert

# padding on the right
RIGHT = OTHER.sort(1, descending=True).values


def accelerated(family: str, head: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """An accelerated model, and transformers' own with the same weights."""
    stock = build(family, head)
    return fastbert.accelerate(copy.deepcopy(stock)), stock


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_traced(family, head):
    m, stock = accelerated(family, head)
    program = traced(m, batch(MASK))
    for mask in (OTHER, RIGHT):
        given = batch(mask)
        agree(program(given), stock(**given), mask)
        agree(program(given), m(**given), mask)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    m, _ = accelerated("Bert", "Model")
    given = batch(RIGHT)
    agree(exported(m, batch(MASK), strict)(given), m(**given), RIGHT)


@ONNX
@pytest.mark.parametrize(
    ("family", "head", "dynamo"),
    [("Bert", "ForTokenClassification", True), ("DistilBert", "ForQuestionAnswering", False)],
)
def test_onnx(family, head, dynamo, tmp_path):
    m, _ = accelerated(family, head)
    given = batch(RIGHT)
    program = onnx(m, batch(MASK), tmp_path / "model.onnx", dynamo)
    agree(program(given), m(**given), RIGHT)


@pytest.mark.skipif(OLD, reason="transformers 4 has a tracer of its own for torch.fx")
def test_fx_and_script():
    m, _ = accelerated("Bert", "Model")

    class Caller(torch.nn.Module):
        """A module of the user's own around the model."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = m

        def forward(self, ids, mask):
            return self.encoder(ids, attention_mask=mask).last_hidden_state

    given = tuple(batch(RIGHT).values())
    program = torch.fx.symbolic_trace(Caller())
    assert torch.equal(program(*given), m(*given).last_hidden_state)
    with pytest.raises(NotImplementedError, match=r"torch\.fx cannot look into BertModel"):
        torch.fx.symbolic_trace(m)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot compile BertModel"):
        torch.jit.script(m)
