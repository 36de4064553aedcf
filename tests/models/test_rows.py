"""The last layer computes only the rows that a head needs, with the losses, outputs and gradients of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import batch, build, close
from torch import Tensor, nn

from fastbert.bert import BertModel
from fastbert.models.encoder import Encoded
from fastbert.models.inputs import Inputs

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
NARROW = [
    ("bert", "ForPreTraining"),
    ("bert", "ForMaskedLM"),
    ("bert", "ForNextSentencePrediction"),
    ("bert", "ForSequenceClassification"),
    ("roberta", "ForMaskedLM"),
    ("roberta", "ForSequenceClassification"),
    ("distilbert", "ForMaskedLM"),
    ("distilbert", "ForSequenceClassification"),
]
CASES = pytest.mark.parametrize(("family", "name"), NARROW)
encode = BertModel.encode


def encode_all(self: BertModel, inputs: Inputs, rows: Tensor | None = None) -> Encoded:
    """`encode` without the shortcut: every row of every layer, then the rows of the argument."""
    e = encode(self, inputs)
    return e if rows is None else e._replace(x=e.x.index_select(0, rows))


def trained(
    model: nn.Module, inputs: dict[str, Any], seed: int = 3
) -> tuple[Any, dict[str, Tensor]]:
    """The outputs of a training step with dropout, and every gradient."""
    torch.manual_seed(seed)
    model.train().zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def compare(model: nn.Module, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a training step with one that computes all rows, and bitwise with itself run again."""
    out, found = trained(model, inputs)
    _, again = trained(model, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(BertModel, "encode", encode_all)
        whole, expected = trained(model, inputs)
    assert out.keys() == whole.keys()
    assert found.keys() == expected.keys()
    for key in ("loss", "logits", "seq_relationship_logits", "mlm_loss", "nsp_loss"):
        if key in out:
            close(out[key], whole[key], key)
    for key, gradient in expected.items():
        assert torch.equal(found[key], again[key]), f"gradient of {key} varies between two runs"
        close(found[key], gradient, f"gradient of {key}")


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@CASES
def test_rows_needed_give_what_all_rows_give(
    family: str, name: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, name, **DROPOUT)[0]
    compare(model, batch(family, name, padding), monkeypatch)


@pytest.mark.parametrize(
    "options", [("output_hidden_states",), ("output_attentions",), ("checkpointing",)]
)
@CASES
def test_with_options(
    family: str, name: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, name, **DROPOUT)[0]
    inputs: dict[str, Any] = dict(batch(family, name))
    if options == ("checkpointing",):
        model.gradient_checkpointing_enable()
    else:
        inputs[options[0]] = True
    compare(model, inputs, monkeypatch)


@CASES
def test_empty_sequences_and_no_labels(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, name, **DROPOUT)[0]
    inputs = dict(batch(family, name))
    for empty in ([1], [0, 2], [0, 1, 2]):
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][empty] = 0
        compare(model, inputs, monkeypatch)
    inputs = dict(batch(family, name))
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    compare(model, inputs, monkeypatch)


def packed(family: str, name: str, tail: int) -> dict[str, Any]:
    """A batch packed by the caller, with labels at first tokens too and `tail` rows that belong to no sequence."""
    inputs = batch(family, name)
    mask = inputs.pop("attention_mask") == 1
    if inputs["labels"].dim() == 2:
        inputs["labels"][:, 0] = 7
    flat = {k: v[mask] if v.shape == mask.shape else v for k, v in inputs.items()}
    flat = {
        k: nn.functional.pad(v, (0, tail), value=3) if v.shape[0] == 19 else v
        for k, v in flat.items()
    }
    return {
        **flat,
        "cu_seqlens": torch.tensor([0, 11, 18, 18, 19], dtype=torch.int32),
        "max_seqlen": 11,
    }


@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("name", ["ForPreTraining", "ForMaskedLM"])
def test_packed_by_the_caller(name: str, tail: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads need the labelled first tokens; there is an empty sequence, and rows after the last one."""
    inputs = packed("bert", name, tail)
    if name == "ForPreTraining":
        inputs["next_sentence_label"] = torch.tensor([0, 1, -100, 1])
    compare(build("bert", name, **DROPOUT)[0], inputs, monkeypatch)


@pytest.mark.parametrize("layers", [0, 1])
def test_few_layers(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert", "ForPreTraining", num_hidden_layers=layers, **DROPOUT)[0]
    compare(model, batch("bert", "ForPreTraining"), monkeypatch)


def widths(model: nn.Module, inputs: dict[str, Any]) -> list[int]:
    """The number of rows of each layer's feed-forward."""
    seen: list[int] = []
    hooks = [
        layer.feed_forward.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
        for layer in model.bert.layers
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_last_layer_sees_the_rows_needed() -> None:
    """Of 19 tokens in three sequences the last layer computes those that a head reads."""
    wide = {"output_hidden_states": True}
    inputs = batch("bert", "ForPreTraining")
    labelled = int((inputs["labels"] != -100).sum())
    model = build("bert", "ForPreTraining")[0]
    assert widths(model.train(), inputs) == [19, labelled + 3]
    assert widths(model, inputs | wide) == [19, 19]
    assert widths(model.eval(), inputs) == [19, 19], (
        "the last layer left out rows though all logits are returned"
    )
    assert widths(model, inputs | {"return_logits": False}) == [19, labelled + 3]
    inputs.pop("labels")
    assert widths(model, inputs | {"return_logits": False}) == [19, 3]
    masked = build("bert", "ForMaskedLM")[0]
    inputs = batch("bert", "ForMaskedLM")
    assert widths(masked.train(), inputs) == [19, labelled]
    assert widths(masked, {"input_ids": inputs["input_ids"], "return_logits": False}) == [33, 0]
    for name in ("ForSequenceClassification", "ForNextSentencePrediction"):
        assert widths(build("bert", name)[0], batch("bert", name)) == [19, 3]
    for name in ("Model", "ForTokenClassification", "ForQuestionAnswering"):
        assert widths(build("bert", name)[0], batch("bert", name)) == [19, 19]
