"""Heads that transformers trained: predictions are its pipelines', and fine-tuning starts from them or says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tasks
import torch

from fastbert.finetune import FinetuneConfig, Predictor, finetune
from fastbert.infer import Filler

transformers = pytest.importorskip("transformers")
TEXTS = ["the great film", "anna met karl in rome", "poor weak"]
NAMES = {"id2label": {0: "toxic", 1: "rude", 2: "threat"}}
MULTI = {"problem_type": "multi_label_classification"}
HEADS: dict[str, dict[str, Any]] = {
    "classes": {"num_labels": 3},
    "classes, named": {"num_labels": 3, "problem_type": "single_label_classification"},
    "several labels": {**NAMES, **MULTI},
    "one label of several": {"num_labels": 1, **MULTI},
    "one output": {"num_labels": 1},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "regression of two": {"num_labels": 2, "problem_type": "regression"},
    "sizes as labels": {"num_labels": 3, "id2label": {0: 0, 1: 1, 2: 2}},
}


def folder(
    path: Path, head: str = "SequenceClassification", family: str = "bert", **kw: Any
) -> Path:
    """A tiny model of transformers with a head, and a tokenizer."""
    tiny_tasks.base_model(path)
    size = json.loads((path / "config.json").read_text())["vocab_size"]
    names = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if family == "distilbert":
        names = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    else:
        names |= {"intermediate_size": 64}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=size, max_position_embeddings=64, pad_token_id=0, **names, **kw
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(path)
    return path


def changed(path: Path, **settings: Any) -> Path:
    """Replace settings of config.json."""
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **settings}))
    return path


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("name", HEADS)
def test_predictions_are_the_pipelines(name: str, family: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", family=family, **HEADS[name])
    pipe = transformers.pipeline("text-classification", model=str(path), top_k=None)
    for found, theirs in zip(Predictor(path).texts(TEXTS), pipe(TEXTS), strict=True):
        expected = {str(t["label"]): t["score"] for t in theirs}
        assert found["probabilities"] == pytest.approx(expected, abs=1e-4)
        assert found["probability"] == max(found["probabilities"].values())
        assert found["probabilities"][found["label"]] == found["probability"]


def test_labels_of_records_are_not_judged_where_they_are_no_classes(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", **NAMES, **MULTI)
    rows = [{"text": t, "label": ["toxic", "rude"]} for t in TEXTS]
    predictions, metrics = Predictor(path).records(rows)
    assert len(predictions) == 3
    assert metrics == {}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, r"id2label has the numbers \[1, 2, 3\]"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "id2label gives two classes one name"),
        ({"id2label": {"0": "a", "x": "b"}}, r"id2label has the keys \['0', 'x'\]: use numbers"),
        ({"id2label": ["a"]}, "id2label is .* it must be a JSON object"),
        ({"architectures": "BertModel"}, "the model in .* is of no named class"),
        ({"architectures": [None]}, "the model in .* is None: predict takes one with a head"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is set: convert"),
        ({"num_hidden_layers": 10**9}, "use the config.json that belongs to these weights"),
        ({"vocab_size": 10**12}, "use the config.json that belongs to these weights"),
        ({"hidden_act": "x" * 90000}, "hidden_act is"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = changed(folder(tmp_path / "m", num_labels=3), **settings)
    with pytest.raises(ValueError, match=sentence) as refusal:
        Predictor(path)
    assert len(str(refusal.value)) < 600


def test_heads_without_weights_give_no_results(tmp_path: Path) -> None:
    path = changed(
        tiny_tasks.base_model(tmp_path / "m"), architectures=["BertForTokenClassification"]
    )
    with pytest.raises(ValueError, match=r"has no weights for .*: its results would be random"):
        Predictor(path)
    with pytest.raises(ValueError, match=r"has no weights for .*: its results would be random"):
        Filler(path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"task": "classif"}, "has a task, max_length, stride or longest_answer"),
        ({"task": ["x"]}, "task is .* it must be a text"),
        ({"max_length": "16"}, "max_length is '16': it must be a whole number"),
        ({"max_length": 10**30}, "has a task, max_length, stride"),
        ({"stride": 15}, "has a task, max_length, stride"),
        ({"pair": 3}, "pair is 3: it must be a text"),
        ({"other": 3}, "holds no options of fastbert finetune"),
    ],
)
def test_options_that_can_not_be(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", num_labels=3)
    (path / "finetune.json").write_text(
        json.dumps({"task": "classify", "max_length": 16, **settings})
    )
    with pytest.raises(ValueError, match=rf"finetune\.json.*{sentence}"):
        Predictor(path)


def test_a_head_with_other_outputs_for_questions(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "QuestionAnswering", num_labels=2)
    assert Predictor(path).texts(["who met karl"], contexts=["anna met karl"])[0]["answer"]
    path = folder(tmp_path / "n", "QuestionAnswering", num_labels=3)
    with pytest.raises(ValueError, match="has two outputs, start and end"):
        Predictor(path)


ROWS = {
    "classify": [
        {"text": f"the film {w}", "label": "abc"[i % 3]}
        for i, w in enumerate(["a", "b", "c", "d", "e", "f"])
    ],
    "tag": tiny_tasks.sentences(8),
    "answer": [
        {
            "question": "who met karl",
            "context": "anna met karl",
            "answer": "anna",
            "answer_start": 0,
        },
        {
            "question": "who met anna",
            "context": "karl met anna",
            "answer": "karl",
            "answer_start": 0,
        },
    ],
}
AUTO = {
    "classify": "SequenceClassification",
    "tag": "TokenClassification",
    "answer": "QuestionAnswering",
}


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("head", ["several labels", "regression of two", "classes"])
def test_finetune_starts_from_them_and_transformers_goes_on(
    task: str, head: str, tmp_path: Path
) -> None:
    """The new config.json says what the new head is, and nothing of the old one."""
    path = folder(tmp_path / "m", **HEADS[head])
    config = FinetuneConfig(task=task, model=str(path), steps=1, max_length=16, threads=1)
    given = {"train": ROWS[task], "validation": ROWS[task]}
    tags = {tag for row in ROWS["tag"] for tag in row["tags"]}
    wanted = {"classify": 3, "tag": len(tags), "answer": None}[task]
    if wanted not in (None, HEADS[head].get("num_labels", 3)):
        with pytest.raises(ValueError, match="has a head for another number of labels"):
            finetune(config, tmp_path / "run", quiet=True, **given)
        return
    result = finetune(config, tmp_path / "run", quiet=True, **given)
    values = json.loads((result.model / "config.json").read_text())
    assert values.get("problem_type") in (None, "single_label_classification")
    model, about = getattr(transformers, f"AutoModelFor{AUTO[task]}").from_pretrained(
        result.model, output_loading_info=True
    )
    assert not any(about[k] for k in ("missing_keys", "mismatched_keys"))
    ids = torch.tensor([[2, 5, 3]])
    target = {"labels": torch.tensor([1])}
    if task == "tag":
        target = {"labels": torch.ones_like(ids)}
    if task == "answer":
        target = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([1])}
    assert model(ids, **target).loss.isfinite()
    assert Predictor(result.model).records(ROWS[task])[1]
