"""The end-to-end benchmark's own parts: agreement, ratios, tables, real workers."""

import copy
import json

import numpy as np
import pytest
import torch

import fastbert
from benchmarks import ROOT
from benchmarks.models import bench_bert, summary, works
from benchmarks.peers import install, models
from benchmarks.peers.driver import Limits, Outcome, Race
from benchmarks.report import plots, readme
from fastbert.backend import cpu

BENCHMARKS = ROOT / "benchmarks"


def result(seconds, cosine, counted=True):
    """A peer's entry in a row, with these samples."""
    return {
        "seconds": summary.percentiles(seconds),
        "samples": seconds,
        "agreement": {"cosine": cosine},
        "counted": counted,
    }


def test_the_best_peer_agrees_and_counts():
    results = {
        "fastbert": result([1.0, 1.0, 2.0], 1.0),
        "wrong": result([0.1] * 3, 0.99),
        "nan": result([0.1] * 3, float("nan")),
        "int8": result([0.2] * 3, 1.0, counted=False),
        "broken": {"reason": "no"},
        "slow": result([4.0] * 3, 1.0),
        "good": result([2.0, 3.0, 2.0], 0.99991),
    }
    row = summary.compared(results, "fp32")
    assert row["best_peer"] == "good"
    # the ratios of the rounds are 2, 3 and 1
    assert row["ratio"] == pytest.approx({"median": 2.0, "p20": 1.4, "p80": 2.6})


def test_a_wrong_result_of_ours_is_compared_with_nothing():
    results = {"fastbert": result([1.0], 0.5), "good": result([2.0], 1.0)}
    assert summary.compared(results, "fp32")["ratio"] is None
    assert summary.compared({"good": result([2.0], 1.0)}, "fp32")["ratio"] is None


def test_agreement_looks_at_real_tokens_only(tmp_path):
    mask = np.array([[1, 1], [1, 0]])
    truth = np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2)
    np.savez(tmp_path / "batch0.npz", attention_mask=mask)
    np.save(tmp_path / "reference.npy", truth)
    other = truth.copy()
    other[1, 1] = 100
    for found, expected in ((other, 1.0), (truth[mask == 1], 1.0), (-truth, -1.0)):
        np.save(tmp_path / "found.npy", found)
        close = summary.agreement({"file": str(tmp_path / "found.npy")}, tmp_path)
        assert close["cosine"] == pytest.approx(expected)
    (tmp_path / "reference.json").write_text('{"loss": 10.0}')
    close = summary.agreement({"loss": 10.5}, tmp_path)
    assert close["loss_difference"] == pytest.approx(0.05)
    assert not summary.agrees(close, "bf16")


def test_flops_of_bert_base():
    # 85 million weights in the encoder's matrices, two operations for each weight and token
    assert works.flops([128] * 8, packed=False) == pytest.approx(2 * 84.9e6 * 1024, rel=0.03)
    share = works.flops(list(works.REAL), packed=True) / works.flops(list(works.REAL), packed=False)
    assert 0.38 < share < 0.41


@pytest.mark.parametrize(("after", "peak"), [(150, 200), (250, 250)])
def test_shares_are_of_the_fma_peak(tiny, tmp_path, after, peak):
    """The peak is the faster of before and after the row; wrong results have no share."""
    work = works.Work("infer", "tiny", "fp32", "tiny", lengths=(5, 9), peak_goal=0.7)
    check, wrong = {"file": str(tiny / "reference.npy")}, {"file": str(tmp_path / "wrong.npy")}
    np.save(wrong["file"], np.ones(np.load(check["file"]).shape))
    packed = works.flops([5, 9], packed=True) / 1e9
    at = lambda *rates, check=check: Outcome([packed / rate for rate in rates], check)  # noqa: E731
    outcomes = {
        "fastbert": at(160, 150, 180),
        "ctranslate2": at(200, 170, 100),
        "fastbert-unfrozen": at(500, check=wrong),
    }
    peaks = {"before": {"fma_gflops_fp32": 200, "gflops_fp32": 900}}
    peaks["after"] = {"fma_gflops_fp32": after, "gflops_fp32": 900}
    made = summary.row(work, outcomes, tiny, {"date": "today", "peaks": peaks, "rounds": 3})
    assert made["peaks"] == peaks
    assert made["peak_gflops"] == peak
    shares = {n: r["of_peak"] for n, r in made["results"].items() if "of_peak" in r}
    assert shares == pytest.approx({"fastbert": 160 / peak, "ctranslate2": 170 / peak})
    (goal,) = (g for g in made["goals"] if g["what"] == "of peak")
    assert goal == {"what": "of peak", "goal": 0.7, "value": shares["fastbert"], "met": after < 200}


def test_the_peak_of_each_precision():
    found = {"before": {"fma_gflops_fp32": 200.0}, "after": {"fma_gflops_fp32": 190.0}}
    assert summary.fma_peak(found, "fp32") == summary.fma_peak(found, "bf16") == 200
    assert summary.fma_peak(found, "int8") is None
    found["after"]["fma_gflops_bf16"] = 900.0
    assert summary.fma_peak(found, "bf16") == 900
    assert summary.fma_peak({"before": {}, "after": {}}, "fp32") is None


def test_int8_is_compared_with_our_own_fp32_and_padding_with_padding():
    entries = {
        "fastbert": result([1.0] * 3, 0.9997),
        "fastbert-fp32": result([1.8] * 3, 1.0, counted=False),
        "ctranslate2-int8": result([1.5] * 3, 0.99),
        "onnxruntime-int8": result([2.5] * 3, 0.93),
        "dynamic-int8": result([0.5] * 3, 0.8),
    }
    found = summary.compared(entries, "int8") | {"saved_ratio": None}
    assert found["best_peer"] == "ctranslate2-int8"
    assert [found[k]["median"] for k in ("ratio", "padded_ratio", "fp32_ratio")] == [1.5, 2.5, 1.8]
    aims = works.Work("infer", "x", "int8", "x", goal=2.0, padded_goal=2.5, fp32_goal=1.7)
    met = [(g["what"], g["met"]) for g in summary.goals(aims, entries, found)]
    assert met == [("speed", False), ("of padded", True), ("of fp32", True)]


def test_rows_without_comparable_peers_stand_last(results):
    first = results["rows"][0]
    first["precision"], first["results"]["sdpa"] = "bf16", {"reason": works.NO_BF16}
    first.update(with_goals(works.Work("infer", "real", "bf16", "x", goal=2), first["results"]))
    assert "| inference |" not in readme.short_table(results)
    full = readme.full_table(results)
    assert full.index("**inference, bf16**") > full.index("**MLM + NSP step, fp32**")
    assert f"- sdpa: {works.NO_BF16}" in full


def test_names_are_unique_and_every_peer_exists():
    assert len({w.name for w in works.WORKS}) == len(works.WORKS)
    assert {p.name for p in works.PEERS} == models.PEERS.keys()
    for peer in works.PEERS:
        assert peer.env is None or (BENCHMARKS / "peers" / f"{peer.env}.txt").is_file()


def test_environments_are_told_by_their_pins(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path))
    home = install.environment("openvino")
    assert home.parent == tmp_path / "peers"
    python, reason = install.find("openvino")
    assert python is None
    assert "install.py openvino" in reason
    home.mkdir(parents=True)
    home.with_suffix(".reason").write_text("can't be installed: no wheel\n")
    assert install.find("openvino") == (None, "can't be installed: no wheel")
    (home / "installed").touch()
    assert install.find("openvino") == (home / "bin" / "python", "")


def with_goals(aims, entries):
    """A row with the entries that summary.row adds."""
    found = {**summary.compared(entries, "fp32"), "saved_ratio": None}
    return {**found, "goals": summary.goals(aims, entries, found)}


@pytest.fixture
def results():
    """Results of two works; one meets its goal."""
    base = {"date": "2026-11-25", "rounds": 3, "fill_percent": 41}
    base |= {"kind": "infer", "fill": "real", "precision": "fp32", "title": "inference"}
    ours = {**result([1.0] * 3, 1.0), "of_peak": 0.5, "gflops": 90.0}
    entries = {"fastbert": ours, "sdpa": result([3.0] * 3, 1.0), "zentorch": {"reason": "no AVX"}}
    first = {**base, "work": "infer-real-fp32", "results": entries}
    aims = works.Work("infer", "real", "fp32", "inference", goal=2, peak_goal=0.88)
    first |= with_goals(aims, entries)
    second = copy.deepcopy({**first, "work": "pretrain-real-fp32", "kind": "pretrain"})
    second["title"] = "MLM + NSP step"
    for name, peak in (("fastbert", 40), ("sdpa", 100)):
        second["results"][name]["memory"] = {"before": 20, "peak": peak}
    aims = works.Work("pretrain", "real", "fp32", "MLM + NSP step", goal=4.0, memory_goal=0.5)
    second |= with_goals(aims, second["results"])
    machine = {"cpu": "a CPU", "instructions": "AVX2", "threads": 2, "cores": 2, "date": "x"}
    machine["versions"] = {"torch": "2.13.0", "transformers": "5.23.0"}
    return {"machine": machine, "environments": {"sdpa": {"torch": "2"}}, "rows": [first, second]}


def test_tables_show_goals_met_and_missed_and_reasons(results, tmp_path):
    assert [(g["what"], g["value"], g["met"]) for row in results["rows"] for g in row["goals"]] == [
        ("speed", 3.0, True),
        ("of peak", 0.5, False),
        ("speed", 3.0, False),
        ("memory", 0.25, True),
    ]
    short = readme.short_table(results)
    assert "| inference | fp32 | 1 s | sdpa 3 s | 3.00x (3.00 to 3.00) | 2x: met; " in short
    assert "88% of peak (50%): **missed**" in short
    assert "| 4x: **missed** |" in short
    assert "40% of stock's process, 25% of what its step adds (goal 50%: met)" in short
    full = readme.full_table(results)
    assert "- zentorch: no AVX" in full
    assert "| sdpa | 3 s | 3 s to 3 s | cosine 1.000000 | -- |" in full
    drawn = plots.draw(results, tmp_path)
    names = ["bert-inference.png", "bert-training.png", "bert-memory.png"]
    assert [file.name for file in drawn] == names
    assert all(file.stat().st_size > 5000 for file in drawn)


def test_the_table_replaces_what_stands_between_the_markers():
    page = f"above\n{readme.BEGIN}\nold\n{readme.END}\nbelow\n"
    assert readme.replaced(page, "new") == page.replace("old", "new")


def test_rows_are_merged_in_order_and_other_machines_are_dropped(results, tmp_path):
    out = tmp_path / "bert.json"
    facts, empty = results["machine"], {"environments": {}, "rows": []}
    assert summary.earlier(out, facts, **empty)["rows"] == []
    out.write_text(json.dumps(results))
    kept = summary.earlier(out, facts, **empty)
    new = {**results["rows"][0], "date": "later"}
    bench_bert.merge(kept, new, {"openvino": Outcome(versions={"openvino": "1"})})
    assert [(r["work"], r["date"]) for r in kept["rows"]] == [
        ("infer-real-fp32", "later"),
        ("pretrain-real-fp32", "2026-11-25"),
    ]
    assert kept["environments"].keys() == {"sdpa", "openvino"}
    other = {**facts, "cpu": "another"}
    assert summary.earlier(out, other, **empty) == {"machine": other, **empty}
    assert summary.earlier(out, facts, runs={})["runs"] == {}


@pytest.fixture
def tiny(tmp_path):
    """A tiny model's directory, with the inputs of a work."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "model")
    return works.make_inputs(tmp_path, works.Work("infer", "tiny", "fp32", "tiny", lengths=(5, 9)))


@pytest.mark.skipif(cpu.native is None, reason="the fastbert peer needs the native module")
def test_inference_is_frozen_unless_asked_not_to(tiny, tmp_path, monkeypatch):
    frozen = []
    job = models.Job("infer", "bf16", tmp_path, tiny, 1)
    monkeypatch.setattr(fastbert, "freeze", frozen.append, raising=False)
    models.fastbert(job, freeze=False)
    assert not frozen
    call = models.fastbert(job)
    assert len(frozen) == 1
    assert not frozen[0].training
    assert call(0).dtype == torch.bfloat16


@pytest.mark.skipif(cpu.native is None, reason="the fastbert peer needs the native module")
def test_a_real_worker(tiny, tmp_path):
    """A tiny model through load, agreement, time and memory; a peer that cannot run gives its reason."""
    inputs = tiny
    work = works.Work("infer", "tiny", "fp32", "tiny", lengths=(5, 9))
    job = {"kind": "infer", "precision": "fp32", "folder": str(tmp_path)}
    job |= {"inputs": str(inputs), "threads": 1}
    limits = Limits(120, 60)
    race = Race(bench_bert.starter(tmp_path), job, calls=2, rounds=2, memory=True, limits=limits)
    # the peer autocast runs bf16 only
    outcomes = race.run(["fastbert", "autocast"])
    assert outcomes["fastbert"].versions["native"] in cpu.native.isas()
    made = summary.row(work, outcomes, inputs, {"date": "today", "peaks": {}, "rounds": 2})
    entry = made["results"]["fastbert"]
    assert 1e7 < entry["memory"]["before"] <= entry["memory"]["peak"] < 1e10
    assert entry["agreement"]["cosine"] > 0.99999
    assert len(entry["samples"]) == 2
    assert made["results"]["autocast"] == {
        "reason": "autocast differs from sdpa in bf16 inference only"
    }
    assert made["fill_percent"] == 78


@pytest.mark.slow
@pytest.mark.skipif(cpu.native is None, reason="the fastbert peer needs the native module")
def test_real_workers_train(tiny, tmp_path):
    work = works.Work("pretrain", "tiny", "fp32", "tiny", lengths=(5, 29), memory_goal=0.5)
    inputs = works.make_inputs(tmp_path, work)
    job = {"kind": "pretrain", "precision": "fp32", "folder": str(tmp_path)}
    job |= {"inputs": str(inputs), "threads": 1}
    race = Race(bench_bert.starter(tmp_path), job, rounds=1, memory=True, limits=Limits(120, 60))
    outcomes = race.run(["fastbert", "sdpa"])
    made = summary.row(work, outcomes, inputs, {"date": "today", "peaks": {}, "rounds": 1})
    assert made["best_peer"] == "sdpa"
    assert all(r["agreement"]["loss_difference"] < 1e-4 for r in made["results"].values())
    assert 0 < made["memory_ratio"]["peak"] < 2
    assert [goal["what"] for goal in made["goals"]] == ["memory"]
