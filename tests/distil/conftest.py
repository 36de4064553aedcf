"""Tiny teachers of every kind, and text for them."""

import json

import pytest
import tiny_tasks
from tiny_distil import TASKS

from fastbert.bert import BertForMaskedLM, BertModel
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.distil import run as module
from fastbert.finetune import finetune


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Most runs draw no curve, which takes longer than the training."""
    if request.node.name != "test_the_command":
        monkeypatch.setattr(module, "plot_curves", lambda *_: None)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """{name: folder} of tiny teachers: one of each task, one of text, one of sentences."""
    folder = tmp_path_factory.mktemp("teachers")
    base = tiny_tasks.base_model(folder / "base", num_hidden_layers=4)
    made = {}

    def get(name):
        if name in made:
            return made[name]
        if name in TASKS:
            config = tiny_tasks.tiny_config(name, base)
            made[name] = finetune(
                config, folder / name, train=tiny_tasks.ROWS[name](128), quiet=True
            ).out
        else:
            made[name] = folder / name
            kind = BertForMaskedLM if name == "text" else BertModel
            kind.from_pretrained(base).save_pretrained(made[name])
            save_tokenizer(load_tokenizer(base), made[name])
            if name == "sentences":
                (made[name] / "modules.json").write_text(json.dumps(_MODULES))
                (made[name] / "1_Pooling").mkdir()
                pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
                (made[name] / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        return made[name]

    return get


_KIND = "sentence_transformers.models"
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{_KIND}.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{_KIND}.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{_KIND}.Normalize"},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text of words that the tiny tokenizer knows, a document a file, and the same as lines."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [row["text"] for row in tiny_tasks.texts(240)]
    for i in range(12):
        (folder / f"{i:02}.txt").write_text("\n".join(f"{text}." for text in rows[i::12]))
    lines = folder.parent / "lines.txt"
    lines.write_text("\n".join(rows))
    return folder, lines
