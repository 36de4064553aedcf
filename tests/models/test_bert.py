"""The models against transformers at random weights: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import CASES, batch, build, close, compare, compare_gradients, scalar_loss


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_parity_with_transformers(family: str, name: str, padding: str) -> None:
    """Outputs at tokens and every gradient, without dropout.

    With left padding transformers pools a padding token, and its span loss includes padding: there only outputs at
    tokens are compared.
    """
    ours, theirs = (m.eval() for m in build(family, name))
    inputs = batch(family, name, padding)
    mask = inputs["attention_mask"]
    a = ours(**inputs, output_hidden_states=True, output_attentions=True)
    b = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    pools = {"ForSequenceClassification", "ForNextSentencePrediction", "ForPreTraining", "Model"}
    tokens_only = (padding == "left" and name in pools) or (
        padding != "none" and name == "ForQuestionAnswering"
    )
    compare(a, b, mask, tokens_only)
    if not tokens_only:
        scalar_loss(a, mask).backward()
        scalar_loss(b, mask).backward()
        compare_gradients(family, name, ours, theirs)


SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "ForMaskedLM", {"hidden_act": "gelu_new"}),
    ("bert", "ForMaskedLM", {"hidden_act": "relu"}),
    ("bert", "ForMaskedLM", {"tie_word_embeddings": False}),
    ("bert", "Model", {"type_vocab_size": 5, "layer_norm_eps": 1e-3, "pad_token_id": 3}),
    ("bert", "Model", {"num_hidden_layers": 0}),
    ("roberta", "ForMaskedLM", {"hidden_act": "gelu_new", "pad_token_id": 5}),
    ("distilbert", "ForMaskedLM", {"hidden_act": "relu"}),
    ("distilbert", "Model", {"position_embedding_type": "sinusoidal"}),
    ("bert", "ForSequenceClassification", {"num_labels": 1}),
    ("bert", "ForSequenceClassification", {"problem_type": "multi_label_classification"}),
    ("bert", "ForSequenceClassification", {"problem_type": "regression"}),
]


@pytest.mark.parametrize(("family", "name", "settings"), SETTINGS)
def test_settings(family: str, name: str, settings: dict[str, Any]) -> None:
    """With settings of a config.json the outputs and gradients are those of transformers."""
    ours, theirs = (m.eval() for m in build(family, name, **settings))
    inputs = batch(family, name)
    if name == "ForSequenceClassification":
        classes = ours.config.num_labels
        values = torch.randn(3, classes, generator=torch.Generator().manual_seed(2))
        kind = settings.get("problem_type", "")
        inputs["labels"] = (values > 0).float() if kind.startswith("multi") else values
    a, b = ours(**inputs), theirs(**inputs)
    compare(a, b, inputs["attention_mask"], tokens_only=False)
    scalar_loss(a, inputs["attention_mask"]).backward()
    scalar_loss(b, inputs["attention_mask"]).backward()
    compare_gradients(family, name, ours, theirs)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_inputs_embeds_and_position_ids(family: str) -> None:
    ours, theirs = (m.eval() for m in build(family, "Model"))
    mask = batch(family, "Model")["attention_mask"]
    embeds = torch.randn(3, 11, 24, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(12, 1, -1)[None]
    for options in ({}, {"position_ids": positions}, {"position_ids": positions.expand(3, 11)}):
        x, y = (embeds.clone().requires_grad_() for _ in range(2))
        a = ours(inputs_embeds=x, attention_mask=mask, **options)
        b = theirs(inputs_embeds=y, attention_mask=mask, **options)
        compare(a, b, mask, tokens_only=False)
        scalar_loss(a, mask).backward()
        scalar_loss(b, mask).backward()
        assert x.grad is not None
        assert y.grad is not None
        close(x.grad[mask == 1], y.grad[mask == 1], "gradient of inputs_embeds")
        assert x.grad[mask == 0].eq(0).all()
