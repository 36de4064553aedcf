"""Small models of transformers with random weights, and ragged batches for them, for the tests of accelerate()."""

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.48")

import fastbert  # noqa: E402

B, S, V = 5, 11, 99
LENGTHS = torch.tensor([11, 3, 7, 1, 9])
MASK = (torch.arange(S) < LENGTHS[:, None]).long()
# transformers 4, whose forwards refuse unknown arguments
OLD = transformers.__version__.startswith("4.")
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert")
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForPreTraining",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)


def config(family: str, **changes: Any) -> Any:
    """A configuration of two layers with heads of size 8."""
    kind = getattr(transformers, f"{family}Config")
    if family == "DistilBert":
        sizes: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}
    else:
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 37,
        }
    if family == "Electra":
        sizes["embedding_size"] = 16
    return kind(**{"vocab_size": V, "num_labels": 3, **sizes, **changes})


def build(family: str, head: str = "Model", **changes: Any) -> Any:
    """A model in eval mode, with weights so large that every part changes the outputs."""
    torch.manual_seed(0)
    if head == "ForQuestionAnswering":
        changes.setdefault("num_labels", 2)
    model = getattr(transformers, family + head)(config(family, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(family: str, head: str = "Model") -> dict[str, torch.Tensor]:
    """A ragged batch with the labels that the head takes."""
    torch.manual_seed(1)
    pad = config(family).pad_token_id
    ids = torch.randint(5, V, (B, S)).where(MASK.bool(), pad)
    given = {"input_ids": ids, "attention_mask": MASK}
    some = (torch.rand(B, S) < 0.4) & MASK.bool()
    if head in ("ForMaskedLM", "ForPreTraining", "ForTokenClassification"):
        given["labels"] = torch.randint(0, 3, (B, S)).where(some, -100)
    if head == "ForPreTraining" and family == "Electra":
        given["labels"] = given["labels"].clamp(0, 1)
    elif head == "ForPreTraining":
        given["next_sentence_label"] = torch.randint(0, 2, (B,))
    if head in ("ForSequenceClassification", "ForNextSentencePrediction"):
        given["labels"] = torch.randint(0, 2, (B,))
    if head == "ForQuestionAnswering":
        given |= {"start_positions": LENGTHS // 3, "end_positions": LENGTHS - 1}
    if head == "ForMultipleChoice":
        given = {name: t.repeat(2, 1, 1) for name, t in given.items()}
        given["labels"] = torch.tensor([1, 3])
    return given


def accelerated(model: Any) -> Any:
    """An accelerated copy."""
    return fastbert.accelerate(copy.deepcopy(model))


def at_tokens(t: torch.Tensor, mask: torch.Tensor = MASK) -> torch.Tensor:
    """The tensor at tokens, or all of it where it has no columns of tokens."""
    return t[mask.bool()] if t.shape[:2] == mask.shape else t


def without_dropout(model: Any) -> Any:
    """The model in training mode with dropout rates of 0."""
    for m in model.train().modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        if hasattr(m, "dropout_prob"):  # transformers 4's sdpa attention
            m.dropout_prob = 0.0
    return model


def assert_same(x: Any, y: Any, mask: torch.Tensor = MASK, atol: float = 3e-6) -> None:
    """Assert that two outputs have the same fields with the same values at tokens."""
    assert list(x.keys()) == list(y.keys())
    for name in x:
        if name == "hidden_states":
            assert len(x[name]) == len(y[name])
            for a, b in zip(x[name], y[name], strict=True):
                torch.testing.assert_close(
                    at_tokens(a, mask), at_tokens(b, mask), atol=atol, rtol=1e-5
                )
        else:
            torch.testing.assert_close(
                at_tokens(x[name], mask), at_tokens(y[name], mask), atol=atol, rtol=1e-5
            )
