"""The benchmark of compressed models: models made once, other engines' metrics with our head, the table, the plot."""

import argparse
import json
import shutil
import sys

import pytest
import tiny_tasks

from benchmarks.models import bench_bert, compression, compression_peers, students, tradeoff
from benchmarks.models.int8_accuracy import Finetuned
from benchmarks.peers.driver import WorkerError
from benchmarks.report.plots import draw_compression
from fastbert.backend import cpu
from fastbert.bert import BertConfig
from fastbert.finetune import finetune

NATIVE = pytest.mark.skipif(cpu.native is None, reason="int8 needs the native module")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """{task: a tiny fine-tuned model and its data}."""
    folder = tmp_path_factory.mktemp("tiny")
    base = tiny_tasks.base_model(folder / "base")
    found = {}
    for task, metric, answer in (("classify", "accuracy", "label"), ("tag", "f1", "tags")):
        rows = tiny_tasks.ROWS[task]
        train, test = (
            tiny_tasks.write_jsonl(folder / f"{task}-{seed}.jsonl", rows(count, seed=seed))
            for seed, count in enumerate((160, 75))
        )
        run = finetune(
            tiny_tasks.tiny_config(task, base), folder / task, train=rows(160), quiet=True
        )
        found[task] = Finetuned(run.model, train, None, test, metric, answer)
    return found


def figures(value, speed, **more):
    """A form's entry in a row."""
    band = {"median": speed, "p20": 0.9 * speed, "p80": 1.1 * speed}
    sizes = {"parameters": 22_000_000, "bytes": 90_000_000}
    return {"value": value, "seconds": {"median": 0.5}, "speed": band, **sizes, **more}


@NATIVE
@pytest.mark.parametrize("task", ["classify", "tag"])
def test_a_worker_with_our_head_decides_as_we_do(task, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "peaks", dict)
    # our own encoder in a process of its own, in the place of another engine
    monkeypatch.setitem(compression_peers.PRECISIONS, "fastbert", "int8")
    monkeypatch.setattr(bench_bert, "find", lambda name: (None, f"no {name} here"))
    peers = ["fastbert", "onnxruntime"]
    options = argparse.Namespace(limit=70, peers=peers, batches=2, rounds=2)
    models = {model: tiny[task].model for model, _ in compression.FORMS.values()}
    row = compression.measured(tiny[task], models, tmp_path, options)
    forms = row["forms"]
    assert (row["examples"], row["batches"]) == (70, 2)
    assert forms["dense"]["value"] > 0.8
    assert forms["fastbert"]["value"] == forms["dense, int8"]["value"]
    assert forms["dense"]["speed"] == {"median": 1, "p20": 1, "p80": 1}
    assert forms["dense, int8"]["bytes"] < forms["dense"]["bytes"]
    assert forms["onnxruntime"] == {"peer": True, "reason": "no onnxruntime here"}


def test_models_are_made_once(tiny, tmp_path, monkeypatch):
    one = tiny["classify"]
    monkeypatch.setattr(students, "STUDENT", "1x32")
    made = []

    def prune(model, data, out, speedup, examples):
        made.append(speedup)
        shutil.copytree(model, out)

    monkeypatch.setattr(compression, "prune", prune)
    found = compression.models("movies", one, tmp_path, tmp_path, quick=True)
    assert made == [2.0, 3.0]
    assert [BertConfig.from_file(folder).num_hidden_layers for folder in found.values()] == [
        2,
        2,
        2,
        1,
    ]
    for module in (compression, students):
        monkeypatch.setattr(module, "distil", lambda *_, **__: pytest.fail("trained again"))
    assert compression.models("movies", one, tmp_path, tmp_path, quick=True) == found
    assert made == [2.0, 3.0]


def test_the_tradeoff_of_pruning_is_measured_point_by_point(tiny, tmp_path, monkeypatch, capsys):
    made = []

    def prune(model, data, out, speedup, examples):
        made.append(speedup)
        if speedup == 9.0:
            raise ValueError("no sizes are so fast")
        shutil.copytree(model, out)

    monkeypatch.setattr(compression, "prune", prune)
    monkeypatch.setattr(tradeoff, "peaks", dict)
    monkeypatch.setitem(tradeoff.WORKS, "movies", lambda runs: tiny["classify"])
    out = tmp_path / "found.json"
    command = ["tradeoff", "--quick", "--runs", str(tmp_path), "--out", str(out), "--limit", "40"]
    command += ["--rounds", "2", "--batches", "1", "--speedups"]
    for speedups in (["1.5"], ["1.5", "2", "9"]):
        monkeypatch.setattr(sys, "argv", command + speedups)
        tradeoff.main()
    # the second run has made what was missing
    assert made == [1.5, 2.0, 9.0]
    row = json.loads(out.read_text())["rows"]["movies"]
    assert [point["asked"] for point in row["points"]] == [1.0, 1.5, 2.0]
    assert {point["value"] for point in row["points"]} == {row["points"][0]["value"]}
    assert row["points"][0]["speed"] == {"median": 1, "p20": 1, "p80": 1}
    assert row["failed"] == {"9": "no sizes are so fast"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "100.00% |\n\n- 9: no sizes are so fast" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "0.5"])
    with pytest.raises(SystemExit):
        tradeoff.main()
    assert "--speedups has 0.5: pass numbers above 1" in capsys.readouterr().err


def test_a_peer_that_fails_leaves_the_race():
    def fail(number):
        raise WorkerError("no luck")

    samples, failed = compression.race({"a": float, "b": fail, "c": lambda _: 0.5}, [1, 2], 3)
    assert samples == {"a": [3.0] * 3, "c": [1.0] * 3}
    assert failed == {"b": "no luck"}
    assert compression.spread(9, 3) == [0, 3, 6]
    assert compression.spread(2, 8) == [0, 1]


def test_the_table_states_goals_and_reasons(tmp_path):
    forms = {form: figures(0.9, 1.0 + i) for i, form in enumerate(compression.FORMS)}
    forms["pruned 2.0"] = figures(0.88, 2.0)
    forms["onnxruntime-int8"] = {"value": 0.85, "peer": True, "speed": forms["dense"]["speed"]}
    forms["ctranslate2-int8"] = {"peer": True, "reason": "no wheel"}
    row = {"examples": 2014, "metric": "accuracy", "batches": 8, "rounds": 15, "tokens": 6400}
    row |= {"date": "2026-01-02", "environments": {"onnxruntime": {"onnxruntime": "1.2"}}}
    row["peaks"] = {"before": {"fma_gflops_fp32": 170.4}, "after": {"fma_gflops_fp32": 171.0}}
    machine = {"cpu": "a CPU", "instructions": "AVX2", "threads": 2}
    machine["versions"] = {"torch": "2", "fastbert": "0"}
    results = {"machine": machine, "rows": {"movies": {**row, "forms": forms}}}
    found = compression.table(results)
    assert "| dense | 22.0 M | 90.0 MB | 90.00 | 100.00% | 1 |  |" in found
    assert "| 97.78% | 2.00 (1.80 to 2.20) | 98.5%: **missed**; 1.9 times: met |" in found
    assert "| onnxruntime-int8 of the dense model | -- | -- | 85.00 | 94.44% |" in found
    assert "- ctranslate2-int8: no wheel\n\n" in found
    assert "170 and 171 GFLOP/s" in found.replace("\n", " ")
    drawn = draw_compression(results, tmp_path / "compression.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_students_with_and_without_a_teacher_are_kept_run_by_run(
    tiny, tmp_path, monkeypatch, capsys
):
    trained = []

    def student(kind, work, one, seed, folder, quick):
        trained.append((kind, seed))
        return 0.8 + 0.01 * seed + 0.05 * (kind == students.DISTILLED)

    monkeypatch.setattr(students, "trained", student)
    monkeypatch.setattr(students, "judged", lambda model, one: model if model != one.model else 0.9)
    monkeypatch.setitem(students.WORKS, "movies", (lambda runs: tiny["classify"], {}, {}))
    out = tmp_path / "students.json"
    command = ["students", "--works", "movies", "--seeds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    students.main()
    assert "5.00 points better, and the larger spread is 0.71" in " ".join(
        capsys.readouterr().out.split()
    )
    kept = json.loads(out.read_text())
    del kept["rows"]["movies"]["labels alone 1"]
    kept["rows"]["entities"] = {"teacher": 0.9, "distilled 0": 0.8}
    out.write_text(json.dumps(kept))
    trained.clear()
    students.main()
    assert trained == [("labels alone", 1)]


def test_students_of_works_that_are_not_done_are_left_out():
    machine = {
        "date": "2026-12-01",
        "cpu": "AMD",
        "instructions": "AVX2",
        "versions": {"torch": "2.13"},
    }
    done = {f"{kind} {i}": 0.8 + 0.01 * i for kind in ("distilled", "labels alone") for i in (0, 1)}
    rows = {"movies": {"teacher": 0.9, **done}, "entities": {"teacher": 0.9, "distilled 0": 0.8}}
    found = students.table({"rows": rows, "machine": machine})
    assert "movie sentences, accuracy, distilled" in found
    assert "CoNLL" not in found
    assert "AMD (AVX2)" in " ".join(found.split())


@pytest.mark.parametrize(
    ("text", "message"), [("{", "can't be read"), ('{"a": 1}', "no results of this benchmark")]
)
def test_students_leave_a_file_of_another_kind_alone(text, message, tmp_path, monkeypatch):
    out = tmp_path / "students.json"
    out.write_text(text)
    monkeypatch.setattr(sys, "argv", ["students", "--out", str(out)])
    monkeypatch.setattr(students, "trained", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match=message):
        students.main()
    assert out.read_text() == text


def test_a_start_that_was_not_finished_is_made_again(tmp_path, monkeypatch):
    base = tiny_tasks.base_model(tmp_path / "base")
    monkeypatch.setattr(students, "fetch", lambda name: base)
    monkeypatch.setattr(students, "STUDENT", "1x32")
    folder = students.start(tmp_path / "start")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in whole.keys() - {"config.json"}:
        (folder / name).unlink()
    students.start(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    monkeypatch.setattr(students, "build_student", lambda *_: pytest.fail("made again"))
    students.start(folder)
