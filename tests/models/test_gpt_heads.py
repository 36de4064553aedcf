"""A GPT that classifies texts and tokens: transformers' models, from its files and back, gradients, fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tasks
import torch
from pairs import close
from test_gpt import batch, models, packed

from fastbert import bert
from fastbert.cli.app import main
from fastbert.finetune import FinetuneConfig, Predictor, finetune
from fastbert.interpret.explainer import Explainer
from fastbert.models.names import TRANSPOSED, hf_keys, names_of

transformers = pytest.importorskip("transformers", minversion="5.0")
HEADS = {"ForSequenceClassification": (3,), "ForTokenClassification": (3, 19)}


@pytest.mark.parametrize("form", ["right", "none", "packed"])
@pytest.mark.parametrize("head", HEADS)
def test_parity_with_transformers(head: str, form: str, tmp_path: Path) -> None:
    kind = getattr(bert, f"Bert{head}")
    ours, theirs = models(head, tmp_path / "theirs", kind=kind, num_labels=4, pad_token_id=0)
    assert not ours.newly_initialised
    inputs: dict[str, Any] = batch("right" if form == "packed" else form)
    mask = inputs["attention_mask"].bool()
    labels = torch.randint(0, 4, HEADS[head])
    if head == "ForTokenClassification":
        labels = labels.where(mask, -100)
    b = theirs(**inputs | {"labels": labels})
    if form == "packed":
        inputs = packed(inputs)
        labels = labels[mask] if labels.dim() == 2 else labels
    a = ours(**inputs | {"labels": labels})
    close(a.loss, b.loss, "loss")
    if head == "ForTokenClassification":
        close(a.logits if form == "packed" else a.logits[mask], b.logits[mask], "logits")
    else:
        close(a.logits, b.logits, "logits")
    a.loss.backward()
    b.loss.backward()
    names, state = names_of("gpt2", f"Bert{head}"), dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        (source,) = hf_keys(key, names)
        found = state[source].grad
        close(p.grad, found.T if source.endswith(TRANSPOSED["gpt2"]) else found, key)
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, f"GPT2{head}").from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[key], value) for key, value in theirs.state_dict().items())


def test_left_padding_and_empty_sequences() -> None:
    """The last token is that of the sequence, not of the row; a sequence without a token has the logits 0."""
    torch.manual_seed(0)
    config = bert.BertConfig(model_type="gpt2", hidden_size=32, num_attention_heads=2)
    model = bert.BertForSequenceClassification(config).eval()
    ids, mask = torch.randint(0, 99, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[0, :4] = mask[1, 3:] = mask[2] = 0
    alone = [model(ids[i][mask[i].bool()][None]).logits[0] for i in range(2)]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    close(found, torch.stack([*alone, torch.zeros(2)]), "logits")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"model_type": "gpt2", "type_vocab_size": 0}
    return tiny_tasks.base_model(tmp_path_factory.mktemp("base"), **sizes)


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_fine_tuning_learns_a_task(task: str, base: Path, tmp_path: Path) -> None:
    config = tiny_tasks.tiny_config(task, base, lr=1e-2)
    rows = tiny_tasks.ROWS[task]
    result = finetune(config, tmp_path, quiet=True, train=rows(96), validation=rows(32, seed=1))
    metric, least = {"classify": ("accuracy", 0.9), "tag": ("f1", 0.8)}[task]
    assert result.validation[metric] > least
    assert Predictor(tmp_path).model.config.causal
    # transformers finds a text's last token
    assert json.loads((result.model / "config.json").read_text())["pad_token_id"] == 0
    head = "SequenceClassification" if task == "classify" else "TokenClassification"
    auto = getattr(transformers, f"AutoModelFor{head}").from_pretrained(result.model)
    assert type(auto).__name__ == f"GPT2For{head}"
    if task == "classify":
        # copies of the folder keep the head
        (tmp_path / "a.txt").write_text("the film was great\n")
        with pytest.raises(SystemExit):
            main(["trim", str(tmp_path), str(tmp_path / "t"), "--texts", str(tmp_path / "a.txt")])
        a, b = (Predictor(f).texts(["the film was great"])[0] for f in (tmp_path, tmp_path / "t"))
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-6)
        # what the last token reads is explained: the one word that says it
        for method in ("integrated", "shap", "rollout"):
            found = Explainer(result.model)("the film great a", method=method).of_words()
            assert method == "rollout" or max(found, key=lambda w: abs(w[3]))[0] == "great"
            assert any(score for *_, score in found)


def test_answers_are_refused(base: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(sources=["x"], task="answer", model=str(base))
    with pytest.raises(ValueError, match="gpt2, whose tokens do not see those behind them"):
        finetune(config, tmp_path / "out", quiet=True, train=tiny_tasks.questions(4))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="or for classes of texts or of tokens"):
        bert.BertForQuestionAnswering.from_pretrained(base)
