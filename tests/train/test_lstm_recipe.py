"""A bidirectional LSTM in the commands: pretraining, resumption, fine-tuning, distillation, and what is refused."""

import pytest
import tiny_run
import tiny_tasks

from fastbert.bert import BertConfig, BertForMaskedLM
from fastbert.data import load_tokenizer
from fastbert.distil import DistilConfig, distil
from fastbert.finetune import Predictor, finetune
from fastbert.infer import Filler
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train import PretrainConfig, pretrain

LSTM = {"recipe": "lstm", "backend": None, "vocab_size": 300, "heads": 12, "lr": 1e-2}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return tiny_run.tiny_settings(tiny_run.write_corpus(tmp_path_factory.mktemp("corpus")), **LSTM)


def test_a_run_that_breaks_off_goes_on_bitwise(settings, tmp_path, monkeypatch):
    whole = pretrain(PretrainConfig(**settings), tmp_path / "whole", quiet=True)
    step = PretrainTrainer.train_step

    def broken(self):
        if self.at.step == 6:
            raise RuntimeError("the power is off")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "train_step", broken)
        with pytest.raises(RuntimeError, match="power"):
            pretrain(PretrainConfig(**settings), tmp_path / "part", quiet=True)
    part = pretrain(None, tmp_path / "part", resume=True, quiet=True)
    assert tiny_run.losses(part.out) == tiny_run.losses(whole.out)
    lines = [line for line in tiny_run.losses(whole.out) if line["kind"] == "train"]
    assert lines[-1]["mlm_loss"] < lines[0]["mlm_loss"] - 0.5
    assert BertForMaskedLM.from_pretrained(part.model).config.recurrent
    [guesses] = Filler(whole.model)("The great <mask> serves the law.", 3)
    assert len(guesses) == 3
    # trained further, with the sizes of the model
    more = {k: v for k, v in settings.items() if k not in ("layers", "hidden", "heads")}
    given = {**more, "steps": 2, "init_from": str(whole.model)}
    again = pretrain(PretrainConfig(**given), tmp_path / "again", quiet=True)
    assert BertForMaskedLM.from_pretrained(again.model).config.num_hidden_layers == 2
    with pytest.raises(ValueError, match="is a lstm and recipe is roberta"):
        pretrain(PretrainConfig(**{**given, "recipe": "roberta"}), tmp_path / "no", quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_tasks.base_model(tmp_path_factory.mktemp("base"), model_type="lstm")


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_fine_tuning_learns_a_task(task, base, tmp_path):
    config = tiny_tasks.tiny_config(task, base, lr=2e-2)
    rows = tiny_tasks.ROWS[task]
    parts = {"train": rows(96), "validation": rows(32, seed=1)}
    result = finetune(config, tmp_path / "out", quiet=True, **parts)
    least = {"classify": ("accuracy", 0.9), "tag": ("f1", 0.8)}[task]
    assert result.validation[least[0]] > least[1]
    assert Predictor(tmp_path / "out").model.config.recurrent


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    base = tiny_tasks.base_model(folder / "base", num_hidden_layers=1)
    config = tiny_tasks.tiny_config("classify", base)
    finetune(config, folder / "out", quiet=True, train=tiny_tasks.texts(128))
    return folder / "out"


def distilled(teacher, **changes):
    given = {"teacher": str(teacher), "student": "lstm:2x32", "epochs": 10, "lr": 1e-2}
    given |= {"dropout": 0.0, "threads": 1, "log_every": 1, "batch_size": 16, "device": "cpu"}
    return DistilConfig(**given | changes)


def test_a_student_learns_from_a_teacher_with_attention(teacher, tmp_path):
    parts = {"train": tiny_tasks.texts(96), "validation": tiny_tasks.texts(48, seed=1)}
    config = distilled(teacher, losses="soft,labels,hidden:0.1,cosine:0.1")
    result = distil(config, tmp_path / "out", quiet=True, **parts)
    assert result.student["accuracy"] > 0.9
    saved = BertConfig.from_file(result.model)
    assert (saved.recurrent, saved.num_hidden_layers, saved.hidden_size) == (True, 2, 32)
    assert load_tokenizer(result.model).get_vocab_size() == saved.vocab_size


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"losses": "soft,relations"}, "losses has relations, and a model is an LSTM"),
        ({"losses": "soft,attention"}, "losses has attention, and a model is an LSTM"),
        ({"layers": "0,0"}, "layers is '0,0' and the student is an LSTM"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1 and the student is an LSTM"),
        ({"student": "lstm:2x31"}, "student is 'lstm:2x31': hidden_size is 31"),
        ({"student": "lstm:2x32x2"}, "student is 'lstm:2x32x2': pass sizes"),
    ],
)
def test_students_that_cannot_be(teacher, changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        distil(
            distilled(teacher, **changes), tmp_path / "out", quiet=True, train=tiny_tasks.texts(9)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"heads": 4}, "heads is 4 and recipe is lstm"),
        ({"ffn": 64}, "ffn is 64 and recipe is lstm"),
        ({"start": "neighbours"}, "start is neighbours and recipe is lstm"),
        ({"gated": True}, "gated is True and recipe is lstm"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1 and recipe is lstm"),
        ({"positions": "rotary"}, "positions is rotary and recipe is lstm"),
        ({"recipe": "roberta", "positions": "none"}, "positions is 'none'"),
    ],
)
def test_settings_of_attention_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        PretrainConfig(**{"recipe": "lstm", "sources": ["x"], "steps": 1} | changes)
    assert PretrainConfig(recipe="lstm", sources=["x"], steps=1).lr == 1e-3
    assert PretrainConfig(sources=["x"], steps=1).lr == 1e-4
