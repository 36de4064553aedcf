"""The benchmarks' command lines: their refusals, and the results that they keep. Nothing is measured here."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ROOT
from benchmarks.models import bench_bert, int8_accuracy, relations, scaling, scripts
from benchmarks.peers.driver import Outcome, Race
from benchmarks.report import readme, tables

BENCHMARKS = ROOT / "benchmarks"
MACHINE = {"date": "2026-01-02", "cpu": "a CPU", "cores": 2, "threads": 2, "instructions": "AVX2"}
FAILED = Outcome(reason="no luck")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs bench_bert with arguments; `outcomes` are the results of every race, `peaks` counts measurements."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    np.savez(inputs / "batch0.npz", attention_mask=np.array([[1, 1], [1, 0]]))
    (inputs / "reference.json").write_text('{"loss": 1.0}')

    def peaks():
        run.peaks += 1
        return {"fma_gflops_fp32": run.peaks}

    def run(*given):
        command = ["bench_bert.py", "--folder", str(tmp_path), "--out", str(run.out), *given]
        monkeypatch.setattr(sys, "argv", command)
        return bench_bert.main()

    run.out, run.peaks, run.outcomes = tmp_path / "out" / "bert.json", 0, {}
    run.rows = lambda: json.loads(run.out.read_text())["rows"]
    monkeypatch.setattr(bench_bert, "peaks", peaks)
    monkeypatch.setattr(bench_bert, "machine_info", lambda: MACHINE)
    monkeypatch.setattr(bench_bert, "make_models", lambda folder: None)
    monkeypatch.setattr(bench_bert, "make_inputs", lambda folder, work: inputs)
    monkeypatch.setattr(Race, "run", lambda race, names: {n: run.outcomes[n] for n in names})
    return run


def test_the_peaks_are_measured_before_and_after_every_row(bench):
    bench.outcomes = {"sdpa": Outcome([2.0], {"loss": 1.0}), "fastbert": FAILED}
    assert bench("--rows", "pretrain-*-fp32", "--peers", "fastbert", "sdpa") == 0
    around = [
        [row["peaks"][k]["fma_gflops_fp32"] for k in ("before", "after")] for row in bench.rows()
    ]
    assert around == [[1, 2], [2, 3]]
    assert [row["peak_gflops"] for row in bench.rows()] == [2, 3]
    first = bench.rows()[0]["results"]
    assert first["fastbert"] == {"reason": "no luck"}
    assert "saved_bytes" not in bench.rows()[0]
    assert first["compiled"] == {"reason": "not asked for in this run"}


def test_a_row_without_a_measurement_is_not_kept(bench, capsys):
    bench.outcomes = {"fastbert": FAILED}
    chosen = ("--rows", "pretrain-full-fp32", "--peers", "fastbert")
    assert bench(*chosen) == 1
    assert not bench.out.exists()
    bench.outcomes = {"fastbert": Outcome([2.0], {"loss": 1.0})}
    assert bench(*chosen) == 0
    kept = bench.out.read_text()
    bench.outcomes = {"fastbert": FAILED}
    assert bench(*chosen) == 1
    assert bench.out.read_text() == kept
    assert "nothing was measured: the row stays what it was" in capsys.readouterr().out
    # nor is a row that no chosen peer takes: no peak is measured then
    bench.peaks = 0
    assert bench("--rows", "pretrain-full-fp32", "--peers", "openvino") == 1
    assert bench.out.read_text() == kept
    assert bench.peaks == 1


def test_what_is_saved_for_backward_stands_beside_stock(bench, monkeypatch):
    saved = {"fastbert": 30e3, "sdpa": 75e3}
    monkeypatch.setattr(bench_bert, "against_stock", lambda lengths, precision: saved)
    bench.outcomes = {name: Outcome([2.0], {"loss": 1.0}) for name in saved}
    assert bench("--rows", "pretrain-full-fp32", "--peers", *saved) == 0
    (row,) = bench.rows()
    assert row["saved_bytes"] == saved
    assert row["goals"][-1] == {"what": "saved", "goal": 0.5, "value": 0.4, "met": True}
    (line,) = readme.memory_lines({"rows": [row]})
    assert "no padding, fp32: 30.0 KB, 40.0% of stock's 75.0 KB (goal 50%: met)" in line


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--peers", "fastbert", "nonsense"), "--peers nonsense matches none of fastbert, "),
        (("--rows", "infer-*", "train-*"), "--rows train-* matches none of infer-real-fp32, "),
        (("--rounds", "0"), "--rounds has to be at least 1"),
    ],
)
def test_what_matches_nothing_is_refused(bench, capsys, given, sentence):
    with pytest.raises(SystemExit) as refused:
        bench(*given)
    assert refused.value.code == 2
    assert sentence in capsys.readouterr().err
    assert bench.peaks == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"rows": [', "can't be read: "),
        ("[1]", "holds no results of this benchmark"),
        ('{"runs": {}, "rows": []}', "holds no results of this benchmark"),
        (None, "can't be read: "),
    ],
    ids=["cut off", "a list", "ops.json", "a folder"],
)
def test_a_file_that_holds_no_results_is_left_alone(bench, content, sentence):
    if content is None:
        bench.out.mkdir(parents=True)
    else:
        bench.out.parent.mkdir()
        bench.out.write_text(content)
    with pytest.raises(SystemExit) as refused:
        bench()
    assert sentence in refused.value.code
    assert "\n" not in refused.value.code
    assert bench.peaks == 0
    assert content is None or bench.out.read_text() == content


@pytest.mark.parametrize("module", [readme, tables])
@pytest.mark.parametrize("flag", ["--help", "--chek"])
def test_asking_for_help_writes_nothing(module, flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["it.py", flag])
    monkeypatch.setattr(Path, "write_text", lambda *_: pytest.fail("a file was written"))
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == (0 if flag == "--help" else 2)
    assert "--check" in "".join(capsys.readouterr())


def test_every_script_has_a_target_and_a_description():
    """Each script with a main part; pytest collects the files bench_<slug>.py for `make bench`."""
    scripts = [file for file in BENCHMARKS.rglob("*.py") if "__main__" in file.read_text()]
    make, page = ((ROOT / name).read_text() for name in ("Makefile", "docs/benchmarks.md"))
    assert len(scripts) > 4
    for file in scripts:
        path = file.relative_to(ROOT)
        module = "-m " + ".".join(path.with_suffix("").parts)
        named = file.name in page or module in page
        assert named, f"docs/benchmarks.md does not name {path}"
        started = str(path) in make or re.search(rf"{module}\b", make)
        started = started or file.name in ("worker.py", "script.py")
        assert started, f"no target runs {file.name}"


def test_a_script_is_compared_with_stock_step_by_step():
    def run(seconds, peak, **more):
        return {"seconds": [9.0, *seconds], "before": 100, "peak": peak, **more}

    stock = [run([2.0, 4.0, 6.0], 300, metric=0.8), run([4.0, 4.0, 4.0], 300, metric=0.9)]
    ours = [run([1.0, 1.0, 3.0], 200, metric=0.85), run([1.0, 2.0, 4.0], 200, metric=0.88)]
    found = scripts.summary(
        [{"stock": s, "accelerated": o} for s, o in zip(stock, ours, strict=True)], "accelerated", 1
    )
    # the ratios are 2, 4, 2, 4, 2, 1
    assert found["speed"]["median"] == 2.0
    assert found["speed"]["rounds"] == 6
    assert found["metrics"] == [0.85, 0.88]
    assert (found["peak"], found["added"]) == (pytest.approx(2 / 3), 0.5)
    row = {"work": "tag", "precision": "fp32", "steps": 4, "date": "2026-11-26"}
    row["variants"] = {"accelerated": found}
    machine = {**MACHINE, "versions": {"torch": "2", "transformers": "5"}}
    line = scripts.table({"machine": machine, "rows": {"tag-fp32": row}}).splitlines()[2]
    assert "2.00x" in line
    assert "1.5x: met" in line
    assert "0.8500, 0.8800" in line
    assert "67% | 50%" in line


def test_encoded_vectors_are_compared_one_by_one(tmp_path):
    x = np.eye(3, dtype=np.float32)
    np.save(tmp_path / "a.npy", x)
    x[1] = [0, 1, 1]
    np.save(tmp_path / "b.npy", x)
    found = {
        name: {"vectors": str(tmp_path / f"{f}.npy")} for name, f in (("stock", "a"), ("o", "b"))
    }
    scripts._compare(found)
    assert found == {"stock": {"cosine": 1.0}, "o": {"cosine": pytest.approx(0.5**0.5)}}


def test_scaling_draws_and_tells_the_growth(tmp_path):
    assert scaling.slope([(1, 9.0), (128, 2.0), (256, 8.0)]) == pytest.approx(2.0)
    taken = {direction: {"median": 0.1} for direction in ("forward", "both")}
    layer = [
        {"T": T, "fill": fill, "seconds": {"fastbert": taken, "torch": taken}}
        for T in (64, 128)
        for fill in ("real", "full")
    ]
    attention = [
        {"S": S, "p": p, "name": name, "peak_bytes": S, "seconds": taken}
        for S in (128, 256)
        for p in (0.0, 0.1)
        for name in ("fastbert", "sdpa", "written out")
    ]
    results = {"machine": MACHINE, "layer": layer, "attention": attention}
    scaling.plot(results, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_relations_keeps_the_part_that_is_not_measured(tmp_path, monkeypatch):
    """Memory may be measured on a busy machine, times may not: each part has its own date."""
    kept = {
        "machine": MACHINE,
        "rows": [{"S": 128, "name": n, "peak_bytes": 9} for n in relations.NAMES],
    }
    (tmp_path / "relations.json").write_text(json.dumps({"memory": kept}))
    monkeypatch.setattr(relations, "TIME_LENGTHS", (16,))
    monkeypatch.setattr(
        sys, "argv", ["relations", "--parts", "times", "--quick", "--out", str(tmp_path)]
    )
    assert relations.main() == 0
    found = json.loads((tmp_path / "relations.json").read_text())
    assert found["memory"] == kept
    assert [(r["S"], r["D"]) for r in found["times"]["rows"]] == [(16, 32), (16, 64)]
    assert all(r["ratio"] > 0 for r in found["times"]["rows"])
    assert (tmp_path / "relations.png").read_bytes().startswith(b"\x89PNG")


def test_relations_times_no_loss_that_differs(monkeypatch):
    calls, written_out = relations.pairs(2, 5, 4), relations.stock
    relations.agree(calls)
    monkeypatch.setattr(relations, "stock", lambda *given: 1.001 * written_out(*given))
    with pytest.raises(AssertionError, match="the losses disagree: not timed"):
        relations.agree(calls)


def test_tables_without_results_says_who_makes_them(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    with pytest.raises(SystemExit, match=r"pytest benchmarks/ops --benchmark-only` writes it$"):
        tables.main()


def test_accuracy_of_int8_reads_tables_and_states_its_goals(tmp_path):
    table = tmp_path / "sts.tsv"
    heading = "split\tscore\tsentence1\tsentence2"
    table.write_text(f'{heading}\ntrain\t1.0\ta\tb\ntest\t2.5\tb\tsays "c\n', encoding="utf-8")
    pairs = [("b", 'says "c', 2.5)]
    assert int8_accuracy.read_pairs(table) == (["a", "b", 'says "c'], pairs)
    table.write_text("b\na\n\nb\n", encoding="utf-8")
    assert int8_accuracy.read_pairs(table) == (["b", "a"], [])
    table.write_text("n\trxn_class\trxn\n0\t1.2\tC>>C\n", encoding="utf-8")
    assert int8_accuracy.read_reactions(table) == (["C>>C"], ["1.2"])
    table.write_text("rxn\nC>>C\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no rxn_class"):
        int8_accuracy.read_reactions(table)
    assert int8_accuracy.right(["1.2.4", "10.1.1", "2.1.1"], ["1.2", "1", "2.1.1"]) == 2 / 3
    x, y = torch.tensor([1.0, 2, 2, 5, 0]), torch.tensor([3.0, 1, 1, 9, 2])
    # by scipy.stats.spearmanr
    assert int8_accuracy.spearman(x, y) == pytest.approx(0.15789473684210528)
    values = {"fp32": 0.9, "12 bits": 0.8975, "8 bits": 0.91}
    shares = {"fp32": 1.0, "12 bits": 0.9985, "8 bits": 0.95}
    rows = {"movies": {"examples": 2000, "values": values, "decisions": 2000, "same": shares}}
    rows["movies"]["date"] = "2026-01-02"
    machine = {**MACHINE, "versions": {"torch": "2", "fastbert": "0"}}
    lines = int8_accuracy.table({"machine": machine, "rows": rows}).splitlines()
    assert "| 90.00 | 89.75 (-0.25) | 91.00 (+1.00) | **missed** |" in lines[2]
    assert "| 100.00% | 99.85% | 95.00% | met |" in lines[3]
