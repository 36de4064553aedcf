"""Distillations that are refused: OUT holds nothing then, and settings that a run would not use are named."""

import json
import shutil

import pytest
import torch
from tiny_distil import distilled, settings

from fastbert.bert import BertConfig, BertForMaskedLM, BertModel
from fastbert.distil import DistilConfig, distil
from fastbert.distil.models import usable
from fastbert.finetune.config import Options


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def without_head(folder):
    BertModel.from_pretrained(folder).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


def with_nan(folder):
    model = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.bert.layers[0].feed_forward.up.weight[0, 0] = torch.nan
    model.save_pretrained(folder)


def of_fewer_tokens(folder):
    config = BertForMaskedLM.from_pretrained(folder).config
    config.vocab_size = 10
    BertForMaskedLM(config).save_pretrained(folder)


# {why a run on text is refused: (changed settings, what is done to a copy of a model's folder, sentence)}
# the folder is passed as the teacher or as the student
TEXT = {
    "teacher without weights": ({"teacher": ""}, without_weights, "has no model.safetensors"),
    "teacher without a head": (
        {"teacher": "", "data": "text"},
        without_head,
        "no weights for cls.predictions",
    ),
    "teacher of fewer tokens": ({"teacher": ""}, of_fewer_tokens, "has 10 tokens and its token"),
    "int8 of NaN": ({"teacher": "", "int8": True, "backend": None}, with_nan, "is not finite"),
    "student without weights": ({"student": ""}, without_weights, "has no model.safetensors"),
    "a student without layers": ({"student": "0x32"}, None, "choose of the losses soft"),
    "parts of a step": ({"shards": 99}, None, "don't fill one batch on each of 99 ranks"),
    "few documents": ({"heldout": 0.99}, None, "12 documents, of which 12 would be held out"),
    "backend of a GPU": ({"backend": "cuda"}, None, "backend 'cuda' can't be used"),
    "wider than its teacher": ({"student": "2x64", "losses": "cosine"}, None, "equal widths"),
    "a layer that there is not": (
        {"losses": "relations", "teacher_layer": 4},
        None,
        "has layers 0 to 3",
    ),
    "a loss of sentences": ({"losses": "vectors"}, None, "the data is text"),
}


@pytest.mark.parametrize("name", TEXT)
def test_a_refused_run_on_text_leaves_nothing(teachers, corpus, tmp_path, name):
    changed, spoil, message = TEXT[name]
    if spoil is not None:
        spoil(shutil.copytree(teachers("text"), tmp_path / "spoilt"))
        changed = {k: str(tmp_path / "spoilt") if v == "" else v for k, v in changed.items()}
    given = settings(teachers("text"), sources=[str(corpus[0])], max_length=32, steps=1) | changed
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distil(DistilConfig(**given), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_was_in_out_before_a_refused_run_stays(teachers, corpus, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("of the user")
    given = settings(teachers("text"), sources=[str(corpus[0])], max_length=32, heldout=0.99)
    with pytest.raises(ValueError, match="would be held out"):
        distil(DistilConfig(**given), out, quiet=True)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


# {a setting without use: (kind of data, settings, sentence)}
UNUSED = {
    "validation of text": ("text", {"validation": "a.txt"}, "validation is 'a.txt': say heldout"),
    "test of text": ("text", {"test": "a.txt"}, "test is 'a.txt': leave it out"),
    "replaced of text": ("text", {"replaced": 0.1}, "replaced is 0.1: leave it out"),
    "replaced of sentences": ("sentences", {"replaced": 0.1}, "the data is sentences"),
    "replaced without teacher": (
        "classify",
        {"replaced": 0.1, "losses": "labels"},
        "the data has no labels of other texts",
    ),
    "metric of text": ("text", {"metric": "f1"}, "metric is 'f1': leave it out"),
    "field": ("classify", {"field": "body"}, "field is 'body': name the columns as in"),
    "separator": ("classify", {"separator": ""}, "separator is '': leave it out"),
    "mask_prob": ("classify", {"mask_prob": 0.2}, "mask_prob is 0.2: leave it out"),
    "data_dir": ("classify", {"data_dir": "shards"}, "data_dir is 'shards': leave it out"),
    "eval_tokens": ("classify", {"eval_tokens": 9}, "eval_tokens is 9: leave it out"),
    "max_tokens": (
        "classify",
        {"max_tokens": 99, "batch_size": None},
        "max_tokens is 99: pass batch_size",
    ),
    "separator of sentences": ("sentences", {"separator": ""}, "separator is '': leave it out"),
    "mask_prob of sentences": ("sentences", {"mask_prob": 0.2}, "the data is sentences"),
    "metric of sentences": ("sentences", {"metric": "f1"}, "metric is 'f1': leave it out"),
    "temperature": ("sentences", {"temperature": 3.0}, "temperature is 3.0 and losses has no soft"),
    "teacher_layer": ("text", {"teacher_layer": 2}, "is 2 and losses has no relations"),
    "relation_heads": ("classify", {"relation_heads": 2}, "is 2 and losses has no relations"),
    "int8": ("classify", {"int8": True, "losses": "labels"}, "which reads no teacher"),
    "patience": (
        "text",
        {"patience": 3, "losses": "relations"},
        "no evaluation judges relations: leave it out",
    ),
    "heldout": (
        "sentences",
        {"heldout": 0.1, "validation": "a.txt"},
        "heldout is 0.1 and validation is given",
    ),
    "split_seed": ("classify", {"split_seed": 3, "validation": "a.csv"}, "split_seed is 3 and"),
    "nothing held out": ("sentences", {"heldout": 0.0}, "heldout is 0 and there is no validation"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_setting_without_use_is_refused(teachers, tmp_path, name):
    kind, changed, message = UNUSED[name]
    config = DistilConfig(**settings(teachers(kind), sources=[str(tmp_path)]) | changed)
    with pytest.raises(ValueError, match=r".") as caught:
        distil(config, tmp_path / "run", quiet=True)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_validation_in_memory_leaves_heldout_without_use(teachers, corpus, tmp_path):
    with pytest.raises(ValueError, match=r"heldout is 0\.2 and validation is given"):
        distilled(teachers, corpus, "labelled", tmp_path / "run", heldout=0.2)


def test_a_teachers_files_are_read_once(teachers, monkeypatch, tmp_path):
    config = DistilConfig(**settings(teachers("classify"), sources=[str(tmp_path)]))
    found = []
    for kind, name in ((BertConfig, "from_file"), (Options, "load")):
        read = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda path, read=read: found.append(path) or read(path))
    usable(config, tmp_path / "run")
    assert found == [teachers("classify") / "model"] * 2


@pytest.mark.parametrize(
    ("student", "more", "sentence"),
    [
        ("4x32", {}, "0.04 M of its parameters are copied from the teacher, layers 0, 1, 2, 3"),
        ("2x32", {"layers": "1,3"}, "are copied from the teacher, layers 1, 3 among them"),
        ("2x32x1", {}, "0.00 M of its parameters are copied from the teacher, no layer among them"),
        ("2x16", {}, "0.00 M of its parameters are copied from the teacher, no layer among them"),
        ("2x16", {"start": "fresh"}, "it starts from random weights"),
    ],
)
def test_what_a_student_starts_from_is_said(teachers, corpus, tmp_path, student, more, sentence):
    said = []
    given = settings(teachers("sentences"), student, sources=[str(corpus[1])], steps=1)
    distil(
        DistilConfig(**given | {"max_length": 32} | more),
        tmp_path / "run",
        quiet=True,
        say=said.append,
    )
    assert sentence in said[0]


def test_equal_sentences_are_counted_once(teachers, tmp_path):
    (tmp_path / "equal.txt").write_text("the film was great\n" * 2)
    config = DistilConfig(
        **settings(teachers("sentences"), sources=[str(tmp_path / "equal.txt")], max_length=32)
    )
    with pytest.raises(ValueError, match="has one text only, 2 times, and none can be held out"):
        distil(config, tmp_path / "run", quiet=True)


def test_a_folder_of_texts_holds_sentences(teachers, corpus, tmp_path):
    """As for text it stands for its files, each with a sentence a line; so does one for validation."""
    folder, _ = corpus
    said = []
    config = DistilConfig(
        **settings(teachers("sentences"), sources=[str(folder)], max_length=32, steps=1),
        validation=str(folder),
    )
    distil(config, tmp_path / "run", quiet=True, say=said.append)
    assert "240 sentences, 240 held out" in said[0]
    (tmp_path / "pictures").mkdir()
    config.sources = [str(tmp_path / "pictures")]
    with pytest.raises(ValueError, match=r"pictures holds no \*\.txt"):
        distil(config, tmp_path / "other", quiet=True)
    config = DistilConfig(**settings(teachers("classify"), sources=[str(folder)]))
    with pytest.raises(ValueError, match="save_to_disk wrote: name a file of labelled data"):
        distil(config, tmp_path / "other", quiet=True)
