"""The settings of fine-tuning: refusals before anything is written; each setting is read by some module."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import tiny_tasks
from tiny_tasks import ROWS, tiny_config, tiny_settings

from fastbert.bert import BertConfig, BertModel
from fastbert.finetune import FinetuneConfig, finetune
from fastbert.finetune import run as module
from fastbert.finetune.config import Options
from fastbert.pretrain.config import PretrainConfig
from fastbert.train import loop as training
from fastbert.train.settings import recorded, with_whole_paths


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_tasks.base_model(tmp_path_factory.mktemp("base"))


def refuse(error, sentence, config, out, **arguments):
    with pytest.raises(error) as caught:
        finetune(config, out, quiet=True, **arguments)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "rows", "sentence"),
    [
        ({"task": None}, None, "task is not said: choose classify, tag or answer"),
        ({"model": None}, None, "model is not said"),
        ({"max_length": 100}, None, "max_length is 100 and the model in"),
        ({}, [{"text": "x", "label": "a"}] * 9, "the training data has one label only, a"),
        ({}, [{"text": "x"}], "the data, row 0 has no field 'label'"),
        ({}, [], "the data holds no record"),
        ({}, [{"text": f"x{i}", "label": str(i / 7)} for i in range(40)], "are these classes?"),
        ({}, [{"text": "x", "label": c} for c in "ab"], "has one text only, 2 times, and none can"),
        ({"label": "stars"}, None, "has no field 'stars', only text, label"),
        ({"task": "tag"}, None, "has no field 'tokens', only text, label"),
    ],
)
def test_bad_settings_write_no_run(base, tmp_path, settings, rows, sentence):
    rows = ROWS["classify"](40) if rows is None else rows
    config = FinetuneConfig(**tiny_settings("classify", base) | settings)
    refuse(ValueError, sentence, config, tmp_path / "run", train=rows)
    assert not (tmp_path / "run" / "config.toml").exists()


def test_tokens_that_the_model_lacks_are_refused_before_training(base, tmp_path):
    small = shutil.copytree(base, tmp_path / "small")
    BertModel(dataclasses.replace(BertConfig.from_file(base), vocab_size=9)).save_pretrained(small)
    rows = ROWS["classify"](40)
    config = tiny_config("classify", small)
    refuse(ValueError, "and the model has 9 tokens", config, tmp_path / "run", train=rows)
    assert not (tmp_path / "run").exists()


def test_strange_labels_are_refused_before_training(base, tmp_path):
    config = tiny_config("classify", base)
    strange = {"train": ROWS["classify"](40), "validation": [{"text": "x", "label": "so so"}]}
    refuse(ValueError, "label 'so so' of the validation data", config, tmp_path / "run", **strange)
    tags = [{"tokens": ["a", "b"], "tags": ["DET", "NOUN"]}] * 9 + [
        {"tokens": ["c"], "tags": ["DET"]}
    ]
    config = tiny_config("tag", base, metric="f1")
    refuse(ValueError, "the tags mark no entities", config, tmp_path / "run", train=tags)


def test_sources_must_be_named(base, tmp_path):
    refuse(ValueError, "sources is empty", tiny_config("tag", base), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"task": "rank"}, "task is 'rank': choose one of classify, tag, answer"),
        ({"task": "answer", "metric": "accuracy"}, "metric is 'accuracy': choose one of f1, exact"),
        ({"max_length": 4}, "max_length is 4: it must be at least 8"),
        ({"stride": 60}, "stride is 60: it must be at most a third of max_length 128"),
        ({"heldout": 0.0}, "heldout is 0 and there is no validation"),
        ({"patience": -1}, "patience is -1: it must be at least 0"),
        ({"batch_size": 0}, "batch_size is 0: it must be above 0"),
    ],
)
def test_bad_values(settings, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        FinetuneConfig(**settings)
    assert sentence in str(caught.value)


def test_defaults_follow_the_task():
    assert FinetuneConfig(task="answer").stride == 128
    assert (FinetuneConfig(task="tag").max_length, FinetuneConfig(steps=3).epochs) == (128, None)


def test_a_run_is_resumed_from_any_folder(tmp_path, monkeypatch):
    """Paths are recorded whole. A relative one that an older version recorded agrees with the same one given again."""
    monkeypatch.chdir(tmp_path)
    given = {"test": "a.csv", "data_dir": "shards", "init_from": "bert"}
    assert with_whole_paths({"test": "a.csv"}, FinetuneConfig) == {"test": str(tmp_path / "a.csv")}
    whole = with_whole_paths(given, PretrainConfig)
    assert (whole["data_dir"], whole["init_from"]) == tuple(
        str(tmp_path / n) for n in ("shards", "bert")
    )
    (tmp_path / "config.toml").write_text('sources = ["b.csv"]\ntest = "a.csv"\n')
    config = recorded(tmp_path, {"test": "a.csv"}, FinetuneConfig)
    assert (config.sources, config.test) == ([str(tmp_path / "b.csv")], str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"test is .*a\.csv' there and .*c\.csv' here"):
        recorded(tmp_path, {"test": "c.csv"}, FinetuneConfig)


def test_every_setting_reaches_the_run():
    """Some module reads each field."""
    folders = [Path(module.__file__).parent, Path(training.__file__).parent]
    files = [p for folder in folders for p in folder.glob("*.py") if p.name != "config.py"]
    text = "".join(p.read_text() for p in files)
    # fields of Options are read from an Options too
    options = {f.name for f in dataclasses.fields(Options)}
    for f in dataclasses.fields(FinetuneConfig):
        read = rf"(config|settings|options|o|self)\.{f.name}\b"
        assert re.search(read, text), f.name
        if f.name in options:
            assert re.search(rf"(options|o)\.{f.name}\b", text), f.name
