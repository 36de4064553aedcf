"""`fastbert quantize`: folders of every kind become int8, and the other commands read them."""

import json
import shutil

import pytest
import tiny_tasks
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from fastbert.backend import cpu
from fastbert.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from fastbert.cli.app import app, main
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.finetune.config import Options
from fastbert.models import checkpoint

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

TEXT = "the man met anna in rome ."


def run(*arguments):
    """The output of a command that must end well."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(capsys, *arguments):
    """The sentence of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An encoder with its tokenizer."""
    return tiny_tasks.base_model(tmp_path_factory.mktemp("base") / "model")


def with_head(base, folder, kind, **settings):
    """A folder with the same tokenizer and a model of another class, with random weights."""
    config = BertConfig.from_file(base)
    torch.manual_seed(2)
    model = kind(BertConfig(**{**vars(config), **settings, "extra": {}}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(load_tokenizer(base), folder)
    return folder


def bytes_of(output):
    """{row: (before, after)} of what the command prints."""
    rows = [line.replace(",", "").split() for line in output.splitlines()[1:]]
    return {" ".join(row[:3]): (int(row[3]), int(row[4])) for row in rows}


@pytest.mark.parametrize("bits", [12, 8])
def test_embed(base, tmp_path, bits):
    out = tmp_path / "new" / "out"
    printed = bytes_of(run("quantize", base, out, "--bits", bits))
    stored = (base / "model.safetensors", out / "model.safetensors")
    assert printed["weights in files"] == tuple(file.stat().st_size for file in stored)
    before, after = printed["weights in memory"]
    assert after < before
    assert BertConfig.from_file(out).int8_bits == bits
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()}
    vectors = run("embed", out, TEXT)
    if bits == 12:
        assert vectors == run("embed", base, TEXT, "--int8")
    # --int8 changes nothing: the folder has its own bits
    assert vectors == run("embed", out, TEXT, "--int8")


def test_fill_mask_and_embeddings(base, tmp_path):
    model = with_head(base, tmp_path / "model", BertForMaskedLM)
    run("quantize", model, tmp_path / "a")
    text = "the [MASK] in rome"
    found = run("fill-mask", tmp_path / "a", text, "--json")
    assert found == run("fill-mask", model, text, "--json", "--int8")
    run("quantize", model, tmp_path / "b", "--embeddings")
    assert BertConfig.from_file(tmp_path / "b").int8_embeddings
    small, large = ((tmp_path / n / "model.safetensors").stat().st_size for n in "ba")
    assert small < large
    words = [
        json.loads(text)["masks"][0]
        for text in (run("fill-mask", tmp_path / "b", text, "--json"), found)
    ]
    assert words[0][0]["word"] == words[1][0]["word"]
    assert words[0][0]["probability"] == pytest.approx(words[1][0]["probability"], rel=0.05)


def test_predict(base, tmp_path):
    """OUT of a run of `fastbert finetune`, with its options, is as good as the model folder in it."""
    names = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": None}
    run_folder = tmp_path / "run"
    model = with_head(base, run_folder / "model", BertForSequenceClassification, **names)
    Options("classify", 16, stride=5).save(model)
    (run_folder / "config.toml").write_text("")
    run("quantize", run_folder, tmp_path / "out")
    assert Options.load(tmp_path / "out") == Options.load(model)
    found = run("predict", tmp_path / "out", TEXT)
    assert found == run("predict", run_folder, TEXT, "--int8")
    assert json.loads(found)["label"] in ("bad", "good")


def test_sentence_transformers(base, tmp_path):
    """The folders that modules.json names are copied, others are not."""
    st = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    width = BertConfig.from_file(base).hidden_size
    parts = [models.Transformer(str(base)), models.Pooling(width), models.Dense(width, 8)]
    parts.append(models.Normalize())
    model = tmp_path / "model"
    st.SentenceTransformer(modules=parts, device="cpu").save(str(model))
    shutil.rmtree(model / "3_Normalize", ignore_errors=True)
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"large")
    run("quantize", model, tmp_path / "out")
    assert not (tmp_path / "out" / "onnx").exists()
    assert run("embed", tmp_path / "out", TEXT) == run("embed", model, TEXT, "--int8")


def test_weights_of_other_formats_are_left_out(base, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in base.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    encoder = BertModel.from_pretrained(base, add_pooler=False)
    torch.save(encoder.state_dict(), model / "tf_model.h5")
    encoder.save_pretrained(model)
    run("quantize", model, tmp_path / "out")
    assert not (tmp_path / "out" / "tf_model.h5").exists()
    # a checkpoint without a pooler gets none
    assert BertConfig.from_file(tmp_path / "out").add_pooler is False
    assert run("embed", tmp_path / "out", TEXT) == run("embed", model, TEXT, "--int8")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(base, tmp_path, monkeypatch, stop):
    def save(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise stop

    monkeypatch.setattr(BertModel, "save_pretrained", save)
    CliRunner().invoke(app, ["quantize", str(base), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_no_room(base, tmp_path, monkeypatch, capsys):
    """safetensors has an exception of its own for it."""

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    error = fails(capsys, "quantize", base, tmp_path / "out")
    assert "model.safetensors can't be written (I/O error: No space left on device" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../other", "1_Pooling/../../other", "/other"])
def test_modules_outside_of_the_folder_are_refused(base, tmp_path, capsys, path):
    model, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(base, model)
    for folder in (model / "1_Pooling", other):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"word_embedding_dimension": 8}))
    kinds = {
        "Transformer": "",
        "Pooling": path.replace("/other", str(other)) if path[0] == "/" else path,
    }
    entries = [{"type": f"sentence_transformers.models.{k}", "path": v} for k, v in kinds.items()]
    (model / "modules.json").write_text(json.dumps(entries))
    error = fails(capsys, "quantize", model, tmp_path / "out")
    assert f"modules.json in {model} names " in error
    assert "which is outside of it: copy that folder into it" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]


def test_refusals(base, tmp_path, capsys):
    run("quantize", base, tmp_path / "out")
    for words, sentence in {
        (base, tmp_path / "new", "--bits", 4): "--bits 4: choose 12 or 8",
        (base, tmp_path / "out"): "is a folder with files: name a new one",
        (base, base / "config.json"): "is a file: name a new folder",
        (base, base / "int8"): f"is inside {base}: name a folder outside of the model",
        (tmp_path / "out", tmp_path / "new"): "are int8 already: pass the model before it",
        (tmp_path / "none", tmp_path / "new"): "there is no directory",
    }.items():
        assert sentence in fails(capsys, "quantize", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    data = tmp_path / "a.csv"
    data.write_text("text,label\na,b\n")
    words = ["finetune", data, "--task", "classify", "--model", tmp_path / "out"]
    error = fails(capsys, *words, "--max-length", 16, "--out", tmp_path / "run")
    assert "has int8 weights, which can't be trained" in error
    words = ["pretrain", data, "--steps", 1, "--init-from", tmp_path / "out"]
    error = fails(capsys, *words, "--max-length", 16, "--out", tmp_path / "run")
    assert "has int8 weights, which can't be trained" in error
