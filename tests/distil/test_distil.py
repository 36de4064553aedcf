"""Distillation: signals of teacher and student, every loss on every kind of data, whole runs, refusals."""

import itertools
import json
import shutil

import numpy as np
import pytest
import ranks
import tiny_tasks
import torch
from tiny_run import losses
from typer.testing import CliRunner

from fastbert.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from fastbert.cli.app import app, main
from fastbert.compress.prune import _smaller
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.distil import DistilConfig, distil
from fastbert.distil import run as module
from fastbert.distil.config import filled_in
from fastbert.distil.losses import score_distance
from fastbert.distil.plan import KINDS, Wanted
from fastbert.distil.sentences import spearman
from fastbert.distil.signals import Recorded, Taps
from fastbert.finetune import Predictor, finetune
from fastbert.infer import Embedder
from fastbert.models.inputs import prepare
from fastbert.nn.packing import Packing

TASKS = ["classify", "tag", "answer"]
# every loss of a kind of data, with weights
ALL = {
    "text": "soft:5,labels:2,cosine,hidden,attention:0.1,relations",
    "labelled": "soft,labels,cosine,hidden,attention:0.1,relations",
    "sentences": "vectors,cosine,hidden,attention:0.1,relations",
}


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


def settings(teacher, student="2x32", **more):
    """Keyword arguments of DistilConfig for a run of about a second."""
    given = {"teacher": str(teacher), "student": student, "epochs": 4, "lr": 3e-3, "dropout": 0.0}
    given |= {"attention_dropout": 0.0, "threads": 1, "backend": "torch", "log_every": 1}
    return given | {"batch_size": 16, "device": "cpu"} | more


def distilled(teachers, corpus, kind, out, task="classify", **more):
    """A run on a kind of data."""
    folder, lines = corpus
    if kind == "labelled":
        rows = tiny_tasks.ROWS[task]
        parts = {"train": rows(96), "validation": rows(32, seed=1), "test": rows(32, seed=2)}
        return distil(DistilConfig(**settings(teachers(task), **more)), out, quiet=True, **parts)
    source = folder if kind == "text" else lines
    given = settings(teachers(kind), sources=[str(source)], max_length=32, **more)
    return distil(DistilConfig(**given), out, quiet=True)


# --- signals ---


def _batch():
    lengths = torch.tensor([5, 1, 9])
    return {
        "input_ids": torch.randint(5, 20, (15,)),
        "token_type_ids": torch.zeros(15, dtype=torch.int64),
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        "max_seqlen": 9,
    }


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bits", [None, 12])
def test_a_recorded_teacher_gives_the_states_of_its_plain_forward(teachers, last, bits):
    model = BertModel.from_pretrained(teachers("text"), add_pooler=False).requires_grad_(False)
    batch, count = _batch(), len(model.layers)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        projected = [
            layer.attention.qkv(x) for layer, x in zip(model.layers, states[:-1], strict=True)
        ]
    wanted = Wanted((0, 2, *((count,) if last else ())), (1, count - 1), vectors=True)
    recorded = Recorded(model, wanted, bits)
    signals = recorded.clear()
    model.frozen = recorded
    rows = torch.tensor([0, 14])
    with torch.no_grad():
        x = model.encode(prepare(model.config, **batch), rows).x
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if bits is None else {"rtol": 0, "atol": 0.02}
    torch.testing.assert_close(x, states[-1][rows], **tolerance)
    assert sorted(signals.hidden) == [*wanted.hidden]
    for number, state in signals.hidden.items():
        torch.testing.assert_close(state, states[number], **tolerance)
    assert sorted(signals.projections) == [*wanted.projections]
    for number, qkv in signals.projections.items():
        torch.testing.assert_close(qkv, projected[number], **tolerance)


def test_layers_behind_the_last_signal_do_not_run(teachers):
    model = BertModel.from_pretrained(teachers("text"), add_pooler=False).requires_grad_(False)
    recorded = Recorded(model, Wanted((), (2,)), None)
    assert recorded.depth == 2
    # a layer that would fail if it ran
    model.layers[3] = torch.nn.Identity()
    model.frozen = recorded
    signals = recorded.clear()
    with torch.no_grad():
        model.encode(prepare(model.config, **_batch()))
    assert [*signals.projections] == [2]


def test_taps_of_a_student_leave_its_fused_ops_and_its_outputs(teachers):
    model = BertModel.from_pretrained(teachers("text"), add_pooler=False).train()
    for p in model.modules():
        if hasattr(p, "p"):
            p.p = 0.0
    batch = _batch()
    plain = model(**batch, output_hidden_states=True)
    taps = Taps(model, Wanted((0, 4), (3,), vectors=True))
    signals = taps.clear()
    found = model(**batch)
    torch.testing.assert_close(found.last_hidden_state, plain.last_hidden_state, rtol=0, atol=0)
    torch.testing.assert_close(signals.hidden[0], plain.hidden_states[0], rtol=0, atol=0)
    torch.testing.assert_close(signals.hidden[4], plain.hidden_states[4], rtol=0, atol=0)
    signals.projections[3].sum().backward()
    assert model.layers[2].feed_forward.up.weight.grad is not None
    assert model.layers[3].feed_forward.up.weight.grad is None


def test_the_distance_of_attention_scores_is_that_of_the_written_out_ones():
    lengths = torch.tensor([5, 1, 9])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    # a row past the last sequence is not read
    own = torch.randn(16, 3, 2, 8, requires_grad=True)
    theirs = torch.randn(16, 3, 2, 4)
    found = score_distance(own, theirs, Packing(cu_seqlens, 9))
    expected = torch.zeros(())
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        scores = [
            torch.einsum("shd,thd->hst", *z[start:end].unbind(1)[:2]) * z.shape[-1] ** -0.5
            for z in (own, theirs)
        ]
        expected = expected + (scores[0] - scores[1]).square().sum() / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    gradients = [torch.autograd.grad(y, own)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_spearman_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 50) * 1.0, rng.normal(size=50)
    assert spearman(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic)


# --- runs ---


@pytest.mark.parametrize("task", TASKS)
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


def test_losses_of_a_step_do_not_depend_on_its_batches(teachers, corpus, tmp_path):
    """One batch of 16 sequences, or two of 8 whose gradients are added."""
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


def test_a_pruned_model_is_a_student(teachers, corpus, tmp_path):
    model = BertForSequenceClassification.from_pretrained(teachers("classify") / "model")
    heads = [torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 1])]
    pruned = _smaller(model, heads, [torch.arange(n) for n in (64, 32, 0, 64)])
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


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "labelled" else pytest.mark.slow) for k in KINDS]
)
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


# --- the command, and refusals ---


def test_the_command(teachers, corpus, tmp_path):
    data = tiny_tasks.write_jsonl(tmp_path / "train.jsonl", tiny_tasks.texts(64))
    flags = ["--student", "1x32", "--steps", "2", "--threads", "1", "--backend", "torch"]
    arguments = [
        "distill",
        str(teachers("classify")),
        str(data),
        *flags,
        "--out",
        str(tmp_path / "run"),
    ]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "teacher" in found.output
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files >= {"model", "config.toml", "metrics.jsonl", "result.json", "curves.png"}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["parameters"]["student"] < result["parameters"]["teacher"]


REFUSED = {
    "no student": ({"student": None}, "pass its sizes"),
    "student of no sizes": ({"student": "small"}, "LAYERSxHIDDEN"),
    "more layers": ({"student": "5x32"}, "--start fresh"),
    "heads": ({"student": "2x32x5"}, "divisible"),
    "a loss that there is not": ({"losses": "soft,mlm"}, "write one of soft"),
    "a weight that is none": ({"losses": "soft:-1"}, "above 0"),
    "a loss of other data": ({"losses": "vectors"}, "data is labelled"),
    "cosine of another width": ({"student": "2x16", "losses": "cosine"}, "equal widths"),
    "attention of other heads": ({"student": "2x16x1", "losses": "attention"}, "equal numbers"),
    "relation heads": ({"losses": "relations", "relation_heads": 3}, "must divide"),
    "a layer that there is not": ({"losses": "relations", "teacher_layer": 4}, "layers 0 to 3"),
    "layers": ({"layers": "0,9"}, "name 2 of"),
    "tokens of a batch": ({"batch_size": None, "max_tokens": 99}, "pass batch_size"),
    "a teacher that is none": ({"teacher": "nowhere"}, "no directory nowhere"),
    "a metric": ({"metric": "exact"}, "accuracy, f1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_can_not_be(teachers, tmp_path, name):
    changed, message = REFUSED[name]
    given = settings(teachers("classify"), sources=[str(tmp_path)]) | changed
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distil(DistilConfig(**given), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_vocabulary(teachers, corpus, tmp_path):
    other = BertForSequenceClassification(
        BertConfig(
            vocab_size=31,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="need one vocabulary"):
        distilled(teachers, corpus, "labelled", tmp_path / "run", student=str(tmp_path / "other"))
    # as many tokens, but others
    folder = shutil.copytree(teachers("classify") / "model", tmp_path / "same_size")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"lima"', '"bonn"'))
    with pytest.raises(ValueError, match=r"another vocabulary .*bonn"):
        distilled(teachers, corpus, "labelled", tmp_path / "run", student=str(folder))


def test_other_labels_than_the_teachers(teachers, tmp_path):
    rows = [{**row, "label": f"very {row['label']}"} for row in tiny_tasks.texts(32)]
    with pytest.raises(ValueError, match="pass data with the teacher's labels"):
        distil(
            DistilConfig(**settings(teachers("classify"))), tmp_path / "run", train=rows, quiet=True
        )


def test_the_kind_of_data_follows_from_the_teacher(teachers):
    for name, kind in {"classify": "labelled", "text": "text", "sentences": "sentences"}.items():
        assert filled_in(DistilConfig(**settings(teachers(name)))).data == kind
    with pytest.raises(SystemExit):
        main(["distill", "nowhere", "x", "--student", "1x8", "--out", "run"])
