"""Whole runs in this process: learning, files, stopping and resuming, refusals."""

import json
import os
import shutil
import signal

import datasets
import pytest
import tiny_run
import tiny_tasks
import torch
from PIL import Image
from tiny_run import losses
from tiny_tasks import ROWS, tiny_config, tiny_settings

from fastbert.finetune import FinetuneConfig, Predictor, finetune
from fastbert.finetune import run as module
from fastbert.finetune.data import Sources, load_data
from fastbert.finetune.loop import FinetuneRun, FinetuneTrainer, training_data
from fastbert.runners.training import TrainingRunner
from fastbert.train.loop import Stopped
from fastbert.train.metrics import read_metrics
from fastbert.train.settings import load_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_tasks.base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Most runs draw no pictures, which take longer than the training; those of `finished` are tested."""
    monkeypatch.setattr(module, "plot_curves", lambda *_: None)
    monkeypatch.setattr(module, "plot_confusion", lambda *_: None)


def run(task, base, out, count=96, **settings):
    rows = ROWS[task]
    parts = {"train": rows(count), "validation": rows(32, seed=1), "test": rows(32, seed=2)}
    return finetune(tiny_config(task, base, **settings), out, quiet=True, **parts)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run of every task."""
    folder = tmp_path_factory.mktemp("finished")
    return {task: run(task, base, folder / task) for task in ROWS}


@pytest.mark.parametrize("task", ROWS)
def test_it_learns(finished, task):
    """The metrics on examples outside of the training data are above 0.9."""
    result = finished[task]
    assert result.test[result.metric] > 0.9
    assert result.validation[result.metric] > 0.9


@pytest.mark.parametrize("task", ROWS)
def test_what_a_run_leaves(finished, task):
    out = finished[task].out
    pictures = {"curves.png"} | (
        {"confusion.png", "confusion_test.png"} if task != "answer" else set()
    )
    files = {"config.toml", "about.json", "metrics.jsonl", "result.json"} | pictures
    assert {p.name for p in out.iterdir()} == files | {"checkpoints", "model", "tensorboard"}
    for picture in pictures:
        with Image.open(out / picture) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(1 << 22)) > 10
    about = json.loads((out / "about.json").read_text())
    assert about["backends"]["attention"] == "torch"
    assert about["examples"] == {"train": 96, "validation": 32, "test": 32}
    config = FinetuneConfig(**load_settings(out / "config.toml", FinetuneConfig))
    assert (config.eval_every, config.checkpoint_every) == (6, 6)
    found = json.loads((out / "result.json").read_text())
    assert found["validation"] == finished[task].validation


@pytest.mark.parametrize("task", ROWS)
def test_the_saved_model_is_the_best_one(finished, task):
    result = finished[task]
    evaluations = [m for m in read_metrics(result.out / "metrics.jsonl") if m["kind"] == "eval"]
    best = max(evaluations, key=lambda m: m[result.metric])
    # max returns the first of several equal evaluations
    assert result.best_step == best["step"]
    assert result.validation == {k: v for k, v in best.items() if k not in ("kind", "step")}


@pytest.mark.parametrize("task", ROWS)
def test_predictions_need_no_labels(finished, task):
    """The saved model has the run's metrics on its test records, and the same predictions without their labels."""
    rows, result = ROWS[task](32, seed=2), finished[task]
    predictions, metrics = Predictor(result.out).records(rows)
    assert metrics == pytest.approx({k: v for k, v in result.test.items() if k != "loss"})
    hidden = {"label", "tags", "answers"}
    bare = [{k: v for k, v in row.items() if k not in hidden} for row in rows]
    again, none = Predictor(result.model, batch_size=5).records(bare)
    assert none == {}
    for one, other in zip(predictions, again, strict=True):
        assert {k: v for k, v in one.items() if isinstance(v, (str, list)) and k != "entities"} == {
            k: v for k, v in other.items() if isinstance(v, (str, list)) and k != "entities"
        }


def test_transformers_loads_and_agrees(finished):
    transformers = pytest.importorskip("transformers")
    model = str(finished["classify"].model)
    pipe = transformers.pipeline("text-classification", model=model, top_k=None)
    text = "the film was great"
    theirs = {found["label"]: found["score"] for found in pipe(text)[0]}
    (ours,) = Predictor(model).texts([text])
    assert ours["probabilities"] == pytest.approx(theirs, abs=1e-5)
    model = str(finished["tag"].model)
    pipe = transformers.pipeline("token-classification", model=model)
    text = "the man met anna smith in rome"
    theirs = [found["entity"] for found in pipe(text, ignore_labels=[])]
    assert Predictor(model).texts([text])[0]["tags"] == theirs


def test_models_from_elsewhere_say_their_task_by_their_head(finished, tmp_path):
    """Models without finetune.json, as transformers saves them: the head gives the task."""
    for task, result in finished.items():
        model = shutil.copytree(result.model, tmp_path / task)
        (model / "finetune.json").unlink()
        rows = ROWS[task](8)
        assert Predictor(model).records(rows)[1] == Predictor(result.model).records(rows)[1]


@pytest.mark.parametrize("task", ROWS)
def test_a_replayed_step_is_the_same_step(base, task):
    """TrainingRunner, which replays steps on a GPU, makes the same padded call on a CPU."""
    steps = []
    for replayed in (False, True):
        config = tiny_config(task, base, steps=3, dropout=0.0, attention_dropout=0.0)
        data = load_data(config, Sources(ROWS[task](32)))
        torch.manual_seed(0)
        model = module.build_model(config, data)
        trainer = FinetuneTrainer(model, training_data(data, config), config)
        trainer._replayed = TrainingRunner(model) if replayed else None
        steps.append([trainer.train_step().loss for _ in range(3)])
    assert steps[1] == pytest.approx(steps[0], rel=1e-5)
    assert len(set(steps[0])) == 3


@pytest.mark.parametrize("task", ROWS)
def test_bf16_trains_close_to_fp32(base, tmp_path, task):
    common = {"steps": 3, "dropout": 0.0, "attention_dropout": 0.0}
    found = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        run(task, base, out, count=48, precision=precision, **common)
        found.append([m["loss"] for m in read_metrics(out / "metrics.jsonl")])
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=3e-2)


def test_entities_of_plain_text(finished):
    text = "The man saw Anna Smith, met Rome."
    (found,) = Predictor(finished["tag"].out).texts([text])
    spans = [(e["type"], text[e["start"] : e["end"]]) for e in found["entities"]]
    assert ("PER", "Anna Smith") in spans
    assert found["words"][5:7] == [",", "met"]


def test_answers_to_plain_questions(finished):
    context = "the man met Karl in Oslo . the film was fine ."
    questions = ["who was with the man", "where was the man"]
    found = Predictor(finished["answer"].out).texts(questions, contexts=[context] * 2)
    assert [f["answer"] for f in found] == ["Karl", "Oslo"]


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_interrupted_runs_leave_no_trace(finished, base, tmp_path, monkeypatch, place):
    """Interrupted in a step, or right after a better model was written: the same losses, best step and metrics."""
    kind, name = (FinetuneTrainer, "backward") if place == "step" else (FinetuneRun, "evaluation")
    original, calls = getattr(kind, name), []

    def breaks(self, *arguments):
        calls.append(1)
        found = original(self, *arguments)
        if len(calls) == (15 if place == "step" else 2):
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(kind, name, breaks)
    out, whole, rows = tmp_path / "run", finished["classify"], ROWS["classify"]
    with pytest.raises(KeyboardInterrupt):
        run("classify", base, out)
    monkeypatch.setattr(kind, name, original)
    again = {"train": rows(96), "validation": rows(32, seed=1), "test": rows(32, seed=2)}
    result = finetune(None, out, resume=True, quiet=True, **again)
    assert losses(out) == losses(whole.out)
    assert (result.best_step, result.validation) == (whole.best_step, whole.validation)
    last = "checkpoints/step-00000024.pt"
    mine, theirs = (torch.load(r / last)["model"] for r in (out, whole.out))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_version_0_1_goes_on(base, tmp_path):
    """The checkpoint lies between two log lines. Its sums that fine-tuning does not have are dropped."""
    out, rows = tmp_path / "run", ROWS["classify"]
    run("classify", base, out, steps=6, log_every=4, checkpoint_every=5)
    expected = losses(out)
    (out / "checkpoints" / "step-00000006.pt").unlink()
    tiny_run.make_old(out / "checkpoints" / "step-00000005.pt")
    again = {"train": rows(96), "validation": rows(32, seed=1), "test": rows(32, seed=2)}
    finetune(None, out, resume=True, quiet=True, **again)
    assert losses(out) == expected


def test_asked_to_stop(base, tmp_path, monkeypatch):
    original = FinetuneTrainer.train_step

    def stopped(self):
        if self.at.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(FinetuneTrainer, "train_step", stopped)
    with pytest.raises(
        Stopped, match=r"after step 3; go on with: fastbert finetune --out .* --resume"
    ):
        run("classify", base, tmp_path / "run")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000003.pt"]


def test_early_stopping_and_going_on_after_it(base, tmp_path):
    """Where the metric can't rise the run ends two evaluations after the first; resuming it adds nothing."""
    out = tmp_path / "run"
    result = run("classify", base, out, lr=1e-12, patience=2, eval_every=2, checkpoint_every=1)
    assert (result.steps, result.best_step) == (6, 2)
    before = losses(out)
    rows = ROWS["classify"]
    again = {"train": rows(96), "validation": rows(32, seed=1), "test": rows(32, seed=2)}
    assert finetune(None, out, resume=True, quiet=True, **again).steps == 6
    assert losses(out) == before


def test_accumulated_steps_are_those_of_larger_batches(base, tmp_path):
    """Batches of tags differ in their number of labels: the mean of their means would be another loss."""
    common = {"steps": 4, "dropout": 0.0, "attention_dropout": 0.0}
    whole = run("tag", base, tmp_path / "whole", **common)
    parts = run("tag", base, tmp_path / "parts", **common, batch_size=4, accumulate=4)
    found = [
        [m["loss"] for m in read_metrics(r.out / "metrics.jsonl") if m["kind"] == "train"]
        for r in (whole, parts)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(set(found[0])) == 4


def test_validation_is_taken_from_the_training_data(base, tmp_path):
    rows = ROWS["answer"](60)
    config = tiny_config("answer", base, steps=1, heldout=0.2)
    result = finetune(config, tmp_path / "run", train=rows, quiet=True)
    sizes = json.loads((result.out / "about.json").read_text())["examples"]
    assert sizes["train"] + sizes["validation"] == 60
    assert 6 <= sizes["validation"] <= 20


def test_questions_without_answers(base, tmp_path):
    rows = tiny_tasks.questions(96, unanswerable=0.4)
    data = {"train": rows, "validation": tiny_tasks.questions(40, 1, unanswerable=0.4)}
    result = finetune(tiny_config("answer", base, epochs=6), tmp_path / "run", quiet=True, **data)
    assert result.validation["exact"] > 0.8
    (found,) = Predictor(result.out).texts(
        ["who was with the man"], contexts=["the man met the man in Oslo ."]
    )
    assert found["answer"] == ""


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_other_families(family, tmp_path):
    """RoBERTa and DistilBERT: their heads, and inputs without token types."""
    sizes = {"model_type": family, "type_vocab_size": 1 if family == "roberta" else 0}
    sizes |= {"pad_token_id": 1} if family == "roberta" else {}
    base = tiny_tasks.base_model(tmp_path / "base", **sizes)
    for task in ROWS:
        result = run(task, base, tmp_path / task, count=32, steps=2)
        assert Predictor(result.out).records(ROWS[task](4))[1].keys() < result.test.keys()


def test_datasets_and_folders(base, tmp_path):
    rows = ROWS["classify"](64)
    labels = datasets.ClassLabel(names=["good", "bad"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    table = {"text": [r["text"] for r in rows], "label": [r["label"] for r in rows]}
    data = datasets.Dataset.from_dict(table, features)
    datasets.DatasetDict(train=data, validation=data.select(range(8))).save_to_disk(
        str(tmp_path / "d")
    )
    settings = tiny_settings("classify", base, steps=2)
    paths = {"sources": [str(tmp_path / "d")], "validation": str(tmp_path / "d")}
    one = finetune(FinetuneConfig(**settings, **paths), tmp_path / "one", quiet=True)
    parts = {"train": data, "validation": data.select(range(8))}
    other = finetune(FinetuneConfig(**settings), tmp_path / "other", quiet=True, **parts)
    assert losses(one.out) == losses(other.out)


def refuse(error, sentence, config, out, **arguments):
    with pytest.raises(error) as caught:
        finetune(config, out, quiet=True, **arguments)
    assert sentence in str(caught.value)


def test_a_classifier_is_trained_further(finished, tmp_path):
    """Its labels keep their numbers in another order too; another number of labels needs another head."""
    model = shutil.copytree(finished["classify"].model, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    settings["id2label"] = {"0": "good", "1": "bad"}
    (model / "config.json").write_text(json.dumps(settings))
    rows = ROWS["classify"](32)
    config = tiny_config("classify", model, steps=1, lr=1e-12)
    result = finetune(config, tmp_path / "run", train=rows, quiet=True)
    # the names of the two classes are exchanged, so nearly every prediction is wrong
    assert result.validation["accuracy"] < 0.1
    rows = [*rows, {"text": "the man", "label": "neither"}]
    sentence = "has a head for another number of labels than the data's 3"
    refuse(ValueError, sentence, config, tmp_path / "other", train=rows)
    assert not (tmp_path / "other").exists()


def test_a_run_goes_on_with_the_same_data_only(finished, tmp_path):
    out = shutil.copytree(finished["classify"].out, tmp_path / "run")
    rows = ROWS["classify"]
    parts = {"train": rows(96, seed=5), "validation": rows(32, seed=1), "test": rows(32, seed=2)}
    refuse(ValueError, "the train data was", None, out, resume=True, **parts)
    other = tiny_config("classify", finished["classify"].out, lr=1.0)
    refuse(ValueError, "lr is 0.003 there and 1.0 here", other, out, resume=True, **parts)
    refuse(FileExistsError, "already holds a run", other, out, **parts)
