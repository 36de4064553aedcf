"""Whole distillations: every kind of data and every loss, resuming, several processes, students of any sizes."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import tiny_tasks
import torch
from tiny_distil import ALL, distilled, settings
from tiny_run import losses

from fastbert.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification
from fastbert.compress.pieces import smaller
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.distil import DistilConfig, distil
from fastbert.distil import run as module
from fastbert.distil.loop import DistilTrainer
from fastbert.distil.models import Models, filled_in
from fastbert.distil.plan import KINDS, Plan
from fastbert.distil.sentences import Sentences
from fastbert.distil.student import Distillation, build_student
from fastbert.distil.teacher import Teacher
from fastbert.finetune import Predictor
from fastbert.infer import Embedder
from fastbert.train.world import World


@pytest.mark.parametrize(
    "task", ["classify", "answer", pytest.param("tag", marks=pytest.mark.slow)]
)
def test_a_student_learns_its_teachers_task(teachers, corpus, tmp_path, task):
    result = distilled(teachers, corpus, "labelled", tmp_path / "run", task, losses="soft,hidden")
    assert result.student_test[result.metric] > 0.85
    assert result.teacher_test[result.metric] > 0.9
    # users load it as any fine-tuned model
    rows = tiny_tasks.ROWS[task](32, seed=2)
    predictor = Predictor(result.out)
    assert predictor.records(rows)[1][result.metric] == result.student_test[result.metric]
    assert predictor.model.config.num_hidden_layers == 2


def test_a_student_of_text_comes_nearer_to_its_teacher(teachers, corpus, tmp_path):
    more = {"losses": "soft", "start": "fresh", "epochs": 8}
    result = distilled(teachers, corpus, "text", tmp_path / "run", **more)
    lines = [line for line in losses(tmp_path / "run") if "soft_loss" in line]
    assert lines[-1]["soft_loss"] < 0.6 * lines[0]["soft_loss"]
    assert result.metric == "mlm_loss_masked"
    assert BertForMaskedLM.from_pretrained(result.model).config.num_hidden_layers == 2


@pytest.mark.parametrize("student", ["2x32", "2x16"])
def test_vectors_of_a_student_are_near_its_teachers(teachers, corpus, tmp_path, student):
    """A narrower student has a learned map, which its folder holds for sentence-transformers too."""
    result = distilled(
        teachers, corpus, "sentences", tmp_path / "run", student=student, lr=1e-2, epochs=8
    )
    assert result.student["cosine"] > 0.8
    texts = ["the film was great", "a man met anna in rome"]
    vectors = Embedder(result.model)(texts)
    assert vectors.shape == (2, 32)
    if student == "2x32":
        # its folder is laid out as the teacher's
        return
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(result.model), device="cpu").encode(texts)
    np.testing.assert_allclose(vectors.numpy(), theirs, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_of_a_kind_of_data(teachers, corpus, tmp_path, kind):
    result = distilled(teachers, corpus, kind, tmp_path / "run", losses=ALL[kind], steps=3)
    line = losses(tmp_path / "run")[-2]
    names = [f"{part.partition(':')[0]}_loss" for part in ALL[kind].split(",")]
    assert all(np.isfinite(line[name]) and line[name] > 0 for name in names)
    assert line["loss"] == pytest.approx(sum(line[name] for name in names), rel=1e-5)
    assert result.steps == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_copy_has_no_distance(teachers, corpus, tmp_path, kind):
    """A student with all layers of its teacher and no dropout is its teacher: every loss but that of labels is 0."""
    names = [n for n in KINDS[kind] if n != "labels"]
    more = {"losses": ",".join(names), "student": "4x32", "steps": 1, "lr": 1e-9}
    distilled(teachers, corpus, kind, tmp_path / "run", **more)
    line = next(line for line in losses(tmp_path / "run") if "loss" in line and "lr" in line)
    for name in names:
        assert abs(line[f"{name}_loss"]) < 2e-4, name


def test_a_teacher_of_moderns_form(teachers, corpus, tmp_path):
    """An exact copy has no distance to it, also behind the last norm; attention's scores are refused."""
    folder = tmp_path / "teacher"
    base = BertForMaskedLM.from_pretrained(teachers("text")).config
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    given = {name: getattr(base, name) for name in sizes}
    teacher = BertForMaskedLM(BertConfig(**given, model_type="modernbert", local_attention=8))
    teacher.save_pretrained(folder)
    save_tokenizer(load_tokenizer(teachers("text")), folder)
    more = {"losses": "soft,cosine,hidden,relations", "student": "4x32", "steps": 1, "lr": 1e-9}
    distilled(lambda _: folder, corpus, "text", tmp_path / "run", **more)
    line = next(line for line in losses(tmp_path / "run") if "loss" in line and "lr" in line)
    assert all(abs(line[f"{name}_loss"]) < 2e-4 for name in more["losses"].split(","))
    with pytest.raises(ValueError, match="rotary positions"):
        distilled(lambda _: folder, corpus, "text", tmp_path / "no", losses="soft,attention")


def test_losses_of_a_step_do_not_depend_on_its_batches(teachers, corpus, tmp_path):
    """A step on one batch of 16 sequences has the loss of a step on two batches of 8 with added gradients."""
    found = []
    for name, more in {"one": {}, "two": {"batch_size": 8, "accumulate": 2}}.items():
        more = {"losses": ALL["labelled"], "steps": 3} | more
        distilled(teachers, corpus, "labelled", tmp_path / name, "tag", **more)
        found.append([line["loss"] for line in losses(tmp_path / name) if "lr" in line])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_resumed_run_has_the_losses_of_one_without_interruption(
    teachers, corpus, tmp_path, monkeypatch
):
    folder, _ = corpus
    given = settings(teachers("text"), sources=[str(folder)], max_length=32, dropout=0.1, steps=8)
    given |= {"checkpoint_every": 3, "losses": "soft:5,labels:2,cosine"}
    distil(DistilConfig(**given), tmp_path / "whole", quiet=True)
    step = module.DistilTrainer.train_step

    def interrupted(self):
        if self.at.step == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(module.DistilTrainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(DistilConfig(**given), tmp_path / "parts", quiet=True)
    monkeypatch.setattr(module.DistilTrainer, "train_step", step)
    distil(None, tmp_path / "parts", resume=True, quiet=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_is_not_resumed_with_other_weights_of_the_teacher(teachers, corpus, tmp_path):
    teacher = shutil.copytree(teachers("text"), tmp_path / "teacher")
    given = settings(teacher, sources=[str(corpus[0])], max_length=32, steps=1)
    distil(DistilConfig(**given), tmp_path / "run", quiet=True)
    model = BertForMaskedLM.from_pretrained(teacher)
    with torch.no_grad():
        model.mlm_head.bias += 1.0
    model.save_pretrained(teacher)
    with pytest.raises(ValueError, match="the teacher's weights"):
        distil(None, tmp_path / "run", resume=True, quiet=True)


def test_a_pruned_model_is_a_student(teachers, corpus, tmp_path):
    model = BertForSequenceClassification.from_pretrained(teachers("classify") / "model")
    heads = [torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 1])]
    pruned = smaller(model, heads, [torch.arange(n) for n in (64, 32, 0, 64)])
    pruned.save_pretrained(tmp_path / "pruned")
    student = str(tmp_path / "pruned")
    result = distilled(
        teachers,
        corpus,
        "labelled",
        tmp_path / "run",
        student=student,
        steps=2,
        losses="soft,hidden",
    )
    saved = BertConfig.from_file(result.model)
    assert saved.layer_sizes == pruned.config.layer_sizes


def test_a_student_starts_from_chosen_layers(teachers, corpus, tmp_path):
    more = {"layers": "1,3", "steps": 1, "lr": 1e-9}
    result = distilled(teachers, corpus, "labelled", tmp_path / "run", **more)
    student = BertForSequenceClassification.from_pretrained(result.model).state_dict()
    teacher = BertForSequenceClassification.from_pretrained(
        teachers("classify") / "model"
    ).state_dict()
    for own, theirs in ((0, 1), (1, 3)):
        name = "bert.layers.{}.attention.qkv.weight"
        torch.testing.assert_close(
            student[name.format(own)], teacher[name.format(theirs)], rtol=0, atol=1e-6
        )
    torch.testing.assert_close(
        student["classifier.weight"], teacher["classifier.weight"], rtol=0, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_of_one(teachers, corpus, tmp_path, kind):
    folder, lines = corpus
    task = {"text": "text", "labelled": "tag", "sentences": "sentences"}[kind]
    source = {"text": folder, "sentences": lines}.get(kind)
    if source is None:
        source = tiny_tasks.write_conll(tmp_path / "data.conll", tiny_tasks.sentences(96))
    more = {"losses": ALL[kind], "steps": 3, "max_length": 32, "shards": 2, "batch_size": 8}
    given = settings(teachers(task), sources=[str(source)], **more)
    codes, errors = ranks.run(2, _train, given, tmp_path / "two", errors=tmp_path / "errors")
    assert codes == [0, 0], errors
    distil(DistilConfig(**given), tmp_path / "one", quiet=True)
    found = [
        [
            [value for name, value in line.items() if name.endswith("loss")]
            for line in losses(tmp_path / name)
            if "lr" in line
        ]
        for name in ("one", "two")
    ]
    assert len(found[0]) == 3
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, rel=2e-4)


def _train(given, out):
    module.plot_curves = lambda *_: None
    distil(DistilConfig(**given), out, quiet=True)


@pytest.mark.parametrize("losses", ["relations", "hidden", "vectors", "vectors,cosine"])
@pytest.mark.parametrize("student", ["2x32", "folder"])
def test_every_trained_weight_gets_a_gradient(teachers, corpus, losses, student):
    """Other processes would wait for a weight without one."""
    _, lines = corpus
    # a model with a pooler, which no vector is made of
    student = str(teachers("sentences").parent / "base") if student == "folder" else student
    given = settings(teachers("sentences"), sources=[str(lines)], student=student, losses=losses)
    config = DistilConfig(**given | {"max_length": 32})
    models = Models.of(config)
    config = filled_in(config, models)
    work = Sentences(SimpleNamespace(config=config, world=World()), models)
    work.open()
    teacher = work.load_teacher()
    built = build_student(config, teacher, work.kind, models.student_folder)
    plan = Plan.of(config, teacher.config, built.config)
    model = Distillation(built, plan, work, teacher.config)
    trainer = DistilTrainer(
        model, Teacher(teacher, work, plan.wanted(1), False), work, replace(config, steps=1)
    )
    batch = next(work.batches.stream())
    trainer.backward(batch, trainer.counts([batch]))
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
