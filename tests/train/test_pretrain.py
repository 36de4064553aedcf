"""Whole runs in this process: their files, their refusals, and that they learn."""

import dataclasses
import json
import os
import shutil

import pytest
import tiny_run
import torch

from fastbert.bert import BertForMaskedLM, BertForPreTraining
from fastbert.data import ShardsError, load_tokenizer
from fastbert.pretrain import run
from fastbert.pretrain.config import load_settings
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train import PretrainConfig, pretrain, session
from fastbert.train.metrics import read_metrics
from fastbert.train.trainer import TrainingError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return pretrain(PretrainConfig(**tiny_run.tiny_settings(corpus)), out, quiet=True)


def copied(finished, tmp_path):
    """A copy of the finished run, which a test may damage."""
    return shutil.copytree(finished.out, tmp_path / "copy")


def test_what_a_run_leaves(finished):
    names = {p.name for p in finished.out.iterdir()}
    files = {"config.toml", "about.json", "metrics.jsonl", "loss.png", "result.json"}
    assert names == files | {"checkpoints", "data", "model", "tensorboard", "tokenizer"}
    assert finished.steps == 12
    assert finished.evaluation["masked"] > 20
    assert finished.baselines["left and right bigrams"] < finished.baselines["unigram entropy"]
    about = json.loads((finished.out / "about.json").read_text())
    assert about["backends"]["attention"] == "torch"
    assert PretrainConfig(**load_settings(finished.out / "config.toml")).steps == 12
    text = "\n".join(run.summary(finished))
    assert "unigram entropy" in text
    assert str(finished.model) in text


def test_tensorboard_has_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished.out / "tensorboard")).Reload()
    lines = [m for m in read_metrics(finished.out / "metrics.jsonl") if m["kind"] == "train"]
    shown = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert shown == [(m["step"], pytest.approx(m["loss"], rel=1e-6)) for m in lines]


def test_model_loads_here_and_in_transformers(finished):
    transformers = pytest.importorskip("transformers")
    ids = load_tokenizer(finished.model).encode("The great [MASK] serves the law.").ids
    theirs = transformers.AutoModelForPreTraining.from_pretrained(finished.model).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(finished.model)
    assert tokens("The great [MASK] serves the law.")["input_ids"] == ids
    ours = BertForPreTraining.from_pretrained(finished.model).eval()
    x = torch.tensor([ids])
    expected = theirs(x).prediction_logits
    torch.testing.assert_close(ours(x).prediction_logits, expected, rtol=1e-4, atol=1e-5)
    checkpoint = torch.load(finished.out / "checkpoints" / "step-00000012.pt", weights_only=True)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, checkpoint["model"][name]), name


def test_it_learns(corpus, tmp_path):
    """All sentences have one form, and sequences are whole sentences: a position determines the kind of its word."""
    whole = {"recipe": "roberta", "tokenizer_kind": "wordpiece", "vocab_size": 200, "dropout": 0.0}
    settings = tiny_run.tiny_settings(corpus, steps=50, hidden=64, eval_every=0, **whole)
    result = pretrain(PretrainConfig(**settings), tmp_path / "run", quiet=True)
    assert result.evaluation["mlm_loss_masked"] < result.baselines["unigram entropy"] - 1.0


def test_roberta(corpus, tmp_path):
    settings = tiny_run.tiny_settings(corpus, recipe="roberta", vocab_size=400, steps=4)
    result = pretrain(PretrainConfig(**settings), tmp_path / "run", quiet=True)
    assert "nsp_accuracy" not in result.evaluation
    model = BertForMaskedLM.from_pretrained(result.model)
    assert model.config.model_type == "roberta"
    # 64 tokens of text, counted from pad_token_id + 1
    assert model.config.max_position_embeddings == 64 + 2


def test_start_from_another_model(corpus, finished, tmp_path):
    settings = tiny_run.tiny_settings(corpus, steps=1, lr=1e-12, init_from=str(finished.model))
    result = pretrain(PretrainConfig(**settings), tmp_path / "run", quiet=True)
    # one step at a negligible learning rate: the same held-out loss
    before, after = finished.evaluation["mlm_loss"], result.evaluation["mlm_loss"]
    assert after == pytest.approx(before, rel=1e-4)


def test_epochs_and_minutes_become_steps(corpus, finished, tmp_path):
    common = {"eval_every": 0, "checkpoint_every": 0, "steps": None}
    epochs = tiny_run.tiny_settings(corpus, **common, epochs=1.5, accumulate=2)
    result = pretrain(PretrainConfig(**epochs), tmp_path / "epochs", quiet=True)
    line = read_metrics(result.out / "metrics.jsonl")[-2]
    assert result.steps == line["step"]
    # training ends in the second epoch, after about half of it
    assert line["epoch"] == 1
    minutes = tiny_run.tiny_settings(corpus, **common, minutes=0.01)
    result = pretrain(PretrainConfig(**minutes), tmp_path / "minutes", quiet=True)
    recorded = PretrainConfig(**load_settings(result.out / "config.toml"))
    assert (recorded.minutes, recorded.steps) == (0.01, result.steps)
    # timing has no effect: a run with the same number of steps has the same losses
    same = PretrainConfig(**minutes | {"minutes": None, "steps": result.steps})
    again = pretrain(same, tmp_path / "steps", quiet=True)
    assert [m["loss"] for m in read_metrics(again.out / "metrics.jsonl")[:-1]] == [
        m["loss"] for m in read_metrics(result.out / "metrics.jsonl")[:-1]
    ]


def test_finished_run_can_be_resumed_again(finished, tmp_path):
    out = copied(finished, tmp_path)
    before = (out / "metrics.jsonl").read_text()
    shutil.rmtree(out / "model")
    result = pretrain(None, out, resume=True, quiet=True)
    assert (out / "metrics.jsonl").read_text() == before
    assert result.evaluation == finished.evaluation
    assert (out / "model" / "config.json").exists()


@pytest.mark.parametrize("recipe", ["bert", "roberta"])
def test_a_checkpoint_of_version_0_1_goes_on(corpus, tmp_path, recipe):
    """The checkpoint lies between two log lines. Its loss of next sentences is dropped for RoBERTa."""
    out = tmp_path / "run"
    often = {"steps": 6, "log_every": 4, "checkpoint_every": 5, "vocab_size": 400}
    settings = tiny_run.tiny_settings(corpus, recipe=recipe, **often)
    pretrain(PretrainConfig(**settings), out, quiet=True)
    expected = tiny_run.losses(out)
    (out / "checkpoints" / "step-00000006.pt").unlink()
    tiny_run.make_old(out / "checkpoints" / "step-00000005.pt")
    pretrain(None, out, resume=True, quiet=True)
    assert tiny_run.losses(out) == expected


def test_gradient_recomputation_changes_nothing(corpus, finished, tmp_path):
    settings = tiny_run.tiny_settings(corpus, recompute=True)
    result = pretrain(PretrainConfig(**settings), tmp_path / "run", quiet=True)
    assert result.evaluation == finished.evaluation


def refuse(error, sentence, **arguments):
    with pytest.raises(error) as caught:
        pretrain(**{"quiet": True, **arguments})
    assert sentence in str(caught.value)
    return str(caught.value)


def test_folder_with_a_run_is_refused(corpus, finished):
    config = PretrainConfig(**tiny_run.tiny_settings(corpus))
    sentence = "already holds a run: go on with --resume, or choose another --out"
    refuse(FileExistsError, sentence, config=config, out=finished.out)


def test_resume_needs_a_run(tmp_path):
    refuse(FileNotFoundError, "holds no run to resume", config=None, out=tmp_path, resume=True)


def test_out_below_a_file_is_refused(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    config = PretrainConfig(**tiny_run.tiny_settings(corpus))
    refuse(OSError, "can't be written to", config=config, out=tmp_path / "file" / "run")


def test_other_settings_are_refused(corpus, finished, tmp_path):
    out = copied(finished, tmp_path)
    config = PretrainConfig(**tiny_run.tiny_settings(corpus, lr=1e-3, seed=5))
    text = refuse(ValueError, "other settings", config=config, out=out, resume=True)
    assert "lr is 0.003 there and 0.001 here; seed is 0 there and 5 here" in text


def test_another_optimiser_is_refused(corpus, finished, tmp_path):
    """Also where the run is older than the setting, which config.toml and the checkpoint then lack: it had AdamW."""
    out = copied(finished, tmp_path)
    recorded = (out / "config.toml").read_text()
    assert 'optimiser = "adamw"\n' in recorded
    (out / "config.toml").write_text(recorded.replace('optimiser = "adamw"\n', ""))
    config = PretrainConfig(**tiny_run.tiny_settings(corpus, optimiser="lamb"))
    text = refuse(ValueError, "other settings", config=config, out=out, resume=True)
    assert "optimiser is 'adamw' there and 'lamb' here" in text


def test_edited_settings_are_refused(finished, tmp_path):
    out = copied(finished, tmp_path)
    edited = (out / "config.toml").read_text().replace("weight_decay = 0.01", "weight_decay = 0.1")
    (out / "config.toml").write_text(edited)
    refuse(
        ValueError, "weight_decay was 0.01 then and is 0.1 now", config=None, out=out, resume=True
    )


def test_free_settings_may_change(corpus, finished, tmp_path):
    config = PretrainConfig(**tiny_run.tiny_settings(corpus, keep_last=7, checkpoint_every=1))
    pretrain(config, copied(finished, tmp_path), resume=True, quiet=True)


def test_changed_text_is_refused(tmp_path):
    corpus = tiny_run.write_corpus(tmp_path / "corpus")
    out = tmp_path / "run"
    pretrain(PretrainConfig(**tiny_run.tiny_settings(corpus, steps=1)), out, quiet=True)
    with open(corpus / "03.txt", "a") as file:
        file.write("One more sentence.\n")
    refuse(ShardsError, "the text of", config=None, out=out, resume=True)


def test_changed_tokenizer_is_refused(finished, tmp_path):
    out = copied(finished, tmp_path)
    path = out / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))
    refuse(ShardsError, "the tokenizer has changed", config=None, out=out, resume=True)


def test_damaged_checkpoint_is_refused(finished, tmp_path):
    out = copied(finished, tmp_path)
    path = out / "checkpoints" / "step-00000012.pt"
    path.write_bytes(path.read_bytes()[:1000])
    refuse(ValueError, "step-00000012.pt is damaged", config=None, out=out, resume=True)
    # the remedy that the sentence names
    path.unlink()
    result = pretrain(None, out, resume=True, quiet=True)
    assert result.evaluation == finished.evaluation


def test_too_little_space_is_seen_before_training(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    config = PretrainConfig(**tiny_run.tiny_settings(corpus))
    refuse(OSError, "GB free and the run needs", config=config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"sources": []}, ValueError, "sources is empty"),
        ({"steps": None}, ValueError, "pass one of steps, epochs and minutes"),
        ({"heads": 5}, ValueError, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"device": "warp"}, ValueError, "device 'warp' can't be used"),
        ({"init_from": "/nowhere"}, FileNotFoundError, "/nowhere"),
        ({"tokenizer": "/nowhere"}, FileNotFoundError, "/nowhere does not exist"),
        ({"sources": ["/nowhere"]}, FileNotFoundError, "/nowhere does not exist"),
        (
            {"vocab_size": 10},
            ValueError,
            "vocab_size is 10, but the special tokens and the alphabet",
        ),
        ({"max_length": 4}, ValueError, "max_length is 4: it must be at least 8"),
        ({"heldout": 0.99}, ValueError, "of which 12 would be held out"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' can't be used: the tensors are on cpu"),
    ],
)
def test_bad_settings_write_nothing(corpus, tmp_path, settings, error, sentence):
    config = PretrainConfig(**tiny_run.tiny_settings(corpus) | settings)
    refuse(error, sentence, config=config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_non_finite_loss_keeps_the_last_checkpoint(corpus, finished, tmp_path, monkeypatch):
    original = PretrainTrainer.backward

    def spoiled(self, batch, *rest):
        losses = original(self, batch, *rest)
        if self.at.step == 6:
            losses[0] = float("nan")
        return losses

    monkeypatch.setattr(PretrainTrainer, "backward", spoiled)
    config = PretrainConfig(**tiny_run.tiny_settings(corpus))
    with pytest.raises(
        TrainingError, match=r"loss is nan .* at step 7 \(epoch 0, batch 6, examples "
    ):
        pretrain(config, tmp_path / "run", quiet=True)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000004.pt"]
    monkeypatch.undo()
    result = pretrain(None, tmp_path / "run", resume=True, quiet=True)
    assert result.evaluation == finished.evaluation


def test_full_disk_at_a_checkpoint_keeps_the_older_one(corpus, finished, tmp_path, monkeypatch):
    saves = []

    def full(state, file):
        saves.append(1)
        if len(saves) == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        tiny_run.original_save(state, file)

    monkeypatch.setattr(torch, "save", full)
    config = PretrainConfig(**tiny_run.tiny_settings(corpus))
    with pytest.raises(TrainingError, match="the checkpoint of step 8 can't be written"):
        pretrain(config, tmp_path / "run", quiet=True)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000004.pt"]
    assert (
        pretrain(None, tmp_path / "run", resume=True, quiet=True).evaluation == finished.evaluation
    )


def test_identity_names_a_changed_backend(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "backends", lambda device: {"attention": "cpu"})
    text = "the backend of each op was"
    refuse(ValueError, text, config=None, out=copied(finished, tmp_path), resume=True)


def test_every_setting_reaches_the_run():
    """Some module reads each field."""
    from pathlib import Path

    package = Path(run.__file__).parents[1]
    sources = [p for folder in ("train", "pretrain") for p in (package / folder).glob("*.py")]
    text = "".join(p.read_text() for p in sources if p.name != "config.py")
    # read by their names' values, or by a method of the settings
    settled = {"beta1", "vocab_size", "batch_ramp"}
    for f in dataclasses.fields(PretrainConfig):
        assert f"config.{f.name}" in text or f.name in settled, f.name


def test_two_processes_in_one_folder(corpus, tmp_path):
    """The second process is refused and writes nothing."""
    out = tmp_path / "run"
    out.mkdir()
    settings = PretrainConfig(**tiny_run.tiny_settings(corpus))
    with session.locked(out), pytest.raises(FileExistsError, match="another process is training"):
        pretrain(settings, out, quiet=True)
    # an empty folder is removed
    assert not out.exists()


def test_out_inside_a_source_is_refused(corpus):
    """The next run would read its metrics.jsonl as text."""
    settings = PretrainConfig(**tiny_run.tiny_settings(corpus))
    with pytest.raises(ValueError, match="lies inside the source"):
        pretrain(settings, corpus / "run", quiet=True)
    assert not (corpus / "run").exists()


def test_damaged_data_is_rebuilt_on_request(finished, tmp_path):
    out = copied(finished, tmp_path)
    shutil.rmtree(out / "data")
    with pytest.raises(FileNotFoundError, match="holds no manifest"):
        pretrain(None, out, resume=True, quiet=True)
    again = pretrain(None, out, resume=True, rebuild=True, quiet=True)
    assert again.evaluation == finished.evaluation
