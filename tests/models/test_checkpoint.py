"""Hugging Face directories: all kinds of files, missing or unfitting weights, refusals, and writing."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import transformers
from pairs import SIZES
from safetensors.torch import load_file, save_file

from fastbert import bert
from fastbert.bert import BertConfig
from fastbert.models import checkpoint

TIED = ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]


def config(family, **settings):
    return BertConfig(**{**SIZES, "num_labels": 3, **settings, "model_type": family})


@pytest.fixture
def saved(tmp_path):
    """A folder with a BertForPreTraining of ours, and its weights under Hugging Face's names."""
    bert.BertForPreTraining(config("bert", num_labels=2)).save_pretrained(tmp_path)
    return tmp_path, load_file(tmp_path / "model.safetensors")


def rewrite(folder, state):
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")


def edit(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def logits(folder):
    model = bert.BertForPreTraining.from_pretrained(folder)
    return model(torch.arange(2, 12)[None]).prediction_logits.detach()


def test_half_precision_files_load_as_fp32_and_save_as_they_are(saved):
    folder, _ = saved
    model = bert.BertForPreTraining.from_pretrained(folder).bfloat16()
    model.save_pretrained(folder)
    assert {v.dtype for v in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    again = bert.BertForPreTraining.from_pretrained(folder)
    assert again.dtype == torch.float32
    assert all(torch.equal(again.state_dict()[k], v.float()) for k, v in model.state_dict().items())


# --- kinds of files ---


def legacy(state):
    found = {}
    for key, value in state.items():
        if "LayerNorm" in key:
            key = key.replace("weight", "gamma").replace("bias", "beta")
        found[key] = value
    return found


def with_duplicates(state):
    return {
        **state,
        TIED[0]: state["bert.embeddings.word_embeddings.weight"],
        TIED[1]: state["cls.predictions.bias"],
        "bert.embeddings.position_ids": torch.arange(24)[None],
    }


def decoder_only(state):
    moved = dict(state)
    moved[TIED[0]] = moved.pop("bert.embeddings.word_embeddings.weight")
    moved[TIED[1]] = moved.pop("cls.predictions.bias")
    return moved


def without_prefix(state):
    return {k.removeprefix("bert."): v for k, v in state.items()}


@pytest.mark.parametrize("change", [legacy, with_duplicates, decoder_only, without_prefix])
def test_names_that_files_have_had(saved, change, caplog):
    folder, state = saved
    expected = logits(folder)
    rewrite(folder, change(state))
    caplog.set_level(logging.INFO)
    assert torch.equal(logits(folder), expected)
    assert not caplog.text


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files(saved, name, sharded):
    folder, state = saved
    expected = logits(folder)
    (folder / "model.safetensors").unlink()
    write = save_file if name.endswith("safetensors") else torch.save
    if sharded:
        keys = sorted(state)
        parts = {f"part-{i}": keys[i::3] for i in range(3)}
        for file, part in parts.items():
            write({k: state[k] for k in part}, folder / file)
        places = {k: file for file, part in parts.items() for k in part}
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        write(state, folder / name)
    assert torch.equal(logits(folder), expected)


def test_a_decoder_of_its_own_is_kept_though_config_ties_it(saved, caplog):
    """As in transformers, which does not tie weights that differ."""
    folder, state = saved
    rewrite(folder, {**state, TIED[0]: torch.randn(61, 24), TIED[1]: torch.randn(61)})
    theirs = transformers.BertForPreTraining.from_pretrained(folder).eval()
    ids = torch.arange(2, 12)[None]
    torch.testing.assert_close(logits(folder), theirs(ids).prediction_logits.detach())
    assert "not the word embedding" in caplog.text


# --- weights that are missing, left over or of another size ---


def test_a_new_head_is_named_and_unused_keys_are_too(saved, caplog):
    folder, _ = saved
    caplog.set_level(logging.INFO)
    model = bert.BertForSequenceClassification.from_pretrained(folder, num_labels=7)
    assert model.classifier.weight.shape == (7, 24)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "classifier.weight, classifier.bias are not in the checkpoint" in warning
    assert "no use for cls.predictions.bias" in caplog.text


def test_overrides(saved):
    folder, _ = saved
    names = {0: "a", 1: "b", 2: "c"}
    model = bert.BertForTokenClassification.from_pretrained(
        folder, id2label=names, hidden_dropout_prob=0.3, num_hidden_layers=1
    )
    assert model.config.id2label == names
    assert model.classifier.out_features == 3
    assert model.config.hidden_dropout_prob == 0.3
    assert len(model.bert.layers) == 1
    with pytest.raises(TypeError, match="got colour, size: it takes a directory and the fields"):
        bert.BertModel.from_pretrained(folder, size=1, colour=2)


def test_missing_encoder_weights(saved):
    folder, state = saved
    rewrite(folder, {k: v for k, v in state.items() if ".layer.1." not in k})
    with pytest.raises(ValueError, match=r"lacks 16 weights .*layer\.1\..* and 8 more\) and has "):
        logits(folder)


def test_the_weights_of_another_family(saved):
    folder, _ = saved
    edit(folder, model_type="roberta")
    with pytest.raises(ValueError, match=r"lacks .* roberta\.embeddings|lacks .*\(roberta\."):
        bert.BertForMaskedLM.from_pretrained(folder)


SHAPES = [
    ({"vocab_size": 60}, r"word_embeddings.weight is \(61, 24\).*\(60, 24\).*pass vocab_size=61"),
    ({"max_position_embeddings": 99}, "pass max_position_embeddings=24"),
    ({"type_vocab_size": 1}, "pass type_vocab_size=2"),
    ({"hidden_size": 48}, r"\(61, 24\) in .*\(61, 48\) in the model: config.json does not belong"),
    ({"intermediate_size": 40}, r"intermediate.dense.weight is \(44, 24\)"),
    ({"num_hidden_layers": 1}, "weights of 2 layers .* says 1: pass num_hidden_layers=2"),
]


@pytest.mark.parametrize(("settings", "message"), SHAPES)
def test_config_that_does_not_fit(saved, settings, message):
    folder, _ = saved
    edit(folder, **settings)
    with pytest.raises(ValueError, match=message):
        logits(folder)


def test_another_number_of_classes(tmp_path):
    bert.BertForSequenceClassification(config("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.weight is \(3, 24\).*pass num_labels=3"):
        bert.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=4)


def test_integer_weights(saved):
    folder, state = saved
    key = "bert.pooler.dense.weight"
    rewrite(folder, {**state, key: state[key].to(torch.int8)})
    with pytest.raises(ValueError, match=rf"{key} .*int8: fastbert loads floating-point"):
        logits(folder)


# --- files that are no checkpoint ---


class Sneaky:
    def __reduce__(self):
        return os.getenv, ("HOME",)


def lfs(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    (folder / "model.safetensors").write_text(text)


def truncate(name, share):
    def change(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return change


def as_bin(content, share=1.0, **options):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(content(state), folder / "pytorch_model.bin", **options)
        truncate("pytorch_model.bin", share)(folder)

    return change


def index(text):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


OLD = {"_use_new_zipfile_serialization": False}
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "there is no configuration"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "no model.safetensors or .*config.json",
    ),
    "empty safetensors": (truncate("model.safetensors", 0), "damaged, not a whole safetensors"),
    "half a safetensors": (truncate("model.safetensors", 0.5), "damaged, not a whole safetensors"),
    "git lfs": (lfs, "Git LFS pointer"),
    "half a .bin": (as_bin(dict, 0.5), "damaged"),
    "half an old .bin": (as_bin(dict, 0.5, **OLD), "damaged"),
    "empty .bin": (as_bin(dict, 0), "damaged"),
    "code in a .bin": (as_bin(lambda s: {**s, "x": Sneaky()}), "Python objects .*getenv"),
    "code in an old .bin": (as_bin(lambda s: [Sneaky()], **OLD), "Python objects .*getenv"),
    "a nested .bin": (as_bin(lambda s: {"model": s}), "more than tensors by name"),
    "a list": (as_bin(lambda s: list(s.values())), "more than tensors by name"),
    "a cut index": (index('{"weight_map": {'), "not an index of shards"),
    "another index": (index('{"weights": {}}'), "not an index of shards"),
    "no shard": (index('{"weight_map": {"a": "x.safetensors"}}'), "lacks x.safetensors, which"),
    "t5": (lambda f: edit(f, model_type="t5"), "model_type is 't5'"),
    "a decoder": (lambda f: edit(f, is_decoder=True), "is_decoder is set"),
    "cut config": (truncate("config.json", 0.5), "not valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_directories(saved, name):
    """Each is refused with one sentence."""
    folder, _ = saved
    change, message = BROKEN[name]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        logits(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_paths_that_are_no_directory(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(FileNotFoundError, match="no directory bert-base-uncased"):
        bert.BertModel.from_pretrained("bert-base-uncased")
    with pytest.raises(ValueError, match=r"model.safetensors is a file: pass the directory"):
        bert.BertModel.from_pretrained(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"config.json is a file: pass a directory to save"):
        bert.BertModel(config("bert")).save_pretrained(folder / "config.json")


# --- writing ---


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    folder, _ = saved
    expected = logits(folder)

    def fail(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        bert.BertForPreTraining(config("bert", num_labels=2)).save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(logits(folder), expected)


def test_a_killed_save_leaves_the_old_checkpoint(saved):
    """The process dies after it has written the new files and before it renames them."""
    folder, _ = saved
    expected = logits(folder)
    program = (
        "import os, sys\nfrom fastbert import bert\n"
        "model = bert.BertForPreTraining.from_pretrained(sys.argv[1])\n"
        "model.mlm_head.bias.data.fill_(3.0)\n"
        "os.replace = lambda *paths: os._exit(9)\n"
        "model.save_pretrained(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=False)
    assert done.returncode == 9
    assert any(p.name.startswith(".unfinished-") for p in folder.iterdir())
    assert torch.equal(logits(folder), expected)


def test_other_files_and_permissions(saved):
    folder, _ = saved
    (folder / "vocab.txt").write_text("[PAD]")
    (folder / "plain").touch()
    model = bert.BertForPreTraining.from_pretrained(folder)
    model.save_pretrained(folder)
    assert (folder / "vocab.txt").read_text() == "[PAD]"
    modes = {(folder / n).stat().st_mode for n in ("plain", "config.json", "model.safetensors")}
    assert len(modes) == 1
