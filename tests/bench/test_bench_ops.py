"""The op benchmarks without timing: cases, goals, rows, the file of results and the page made from it."""

import importlib
import json

import pytest
import torch

from benchmarks.ops import bench_attention, opbench
from benchmarks.ops.opbench import Spec
from benchmarks.report import tables
from fastbert import functional
from fastbert.backend import cpu
from fastbert.backend.names import SLUGS
from fastbert.backend.reference.samples import Cost
from fastbert.testing import peaks
from fastbert.testing.timing import Timing, interleave_training

PEAKS = {"gflops_fp32": 100.0, "gflops_bf16": 50.0, "copy_gb_per_s": 10.0, "threads": 2}
MACHINE = {
    "date": "2026-01-02",
    "cpu": "some chip",
    "instructions": "AVX2",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
}


def bench(slug):
    """The op's benchmark module."""
    return importlib.import_module(f"benchmarks.ops.bench_{slug}")


def timing(us):
    """A measurement with this median, in microseconds."""
    return Timing(us * 1e-6, us * 0.9e-6, us * 1.2e-6, 7)


def row(slug="linear", T=512, direction="forward", ours=10.0, eager=20.0, compiled=15.0, **more):
    """One row with made-up times, as run_case stores it."""
    spec = Spec(slug, T, more.pop("C", 768), more.pop("dtype", "fp32"), more.pop("variant", ""))
    times = {"fastbert": timing(ours), "eager": timing(eager), "compiled": timing(compiled)}
    made = opbench.row(spec, direction, times, Cost(10**5, 10**5, 10**5, 3 * 10**5), PEAKS)
    return {**made, "gate": "fp64 reference", "backend": "torch"}


def small(spec):
    """The spec at a small size."""
    C = 40 if spec.slug == "cross_entropy" else 8 if spec.variant == "split" else 64
    return Spec(spec.slug, 24, C, spec.dtype, spec.variant)


VARIANTS = {(s.slug, s.variant, s.dtype): s for slug in SLUGS for s in bench(slug).GRID}.values()


@pytest.mark.parametrize("slug", SLUGS)
def test_the_grid_has_every_size(slug):
    specs = bench(slug).GRID
    assert {s.slug for s in specs} == {slug}
    assert len({s.id for s in specs}) == len(specs)
    assert {s.dtype for s in specs} == {"fp32", "bf16"}
    shapes = {(s.T, s.C) for s in specs if s.dtype == "fp32"}
    if slug == "cross_entropy":
        assert {T for T, _ in shapes} == set(opbench.TOKENS)
        assert all(s.T * s.C * 4 < 1e9 for s in specs)
    else:
        assert shapes == {(T, C) for T in opbench.TOKENS for C in opbench.HIDDEN}


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda s: f"{s.slug}-{s.variant}-{s.dtype}")
def test_the_op_takes_the_case_and_stock_computes_the_same(spec, monkeypatch):
    module = bench(spec.slug)
    if hasattr(module, "VOCAB"):
        monkeypatch.setattr(module, "VOCAB", 50)
    case = module.build(small(spec))
    cost = opbench.cost_of(spec.slug, case.ours)
    assert min(cost) > 0
    forward, backward = opbench.pair(getattr(functional, spec.slug), case.ours)
    assert all(torch.isfinite(grad).all() for grad in backward(forward()))
    ours, theirs = dict(case.ours), dict(case.stock_args)
    for args in (ours, theirs):
        if "p" in args:
            args["p"] = 0.0
    with torch.no_grad():
        a, b = getattr(functional, spec.slug)(**ours), case.stock(**theirs)
    if spec.slug == "attention":
        lengths = bench_attention.lengths_of(24, spec.variant)
        b = torch.cat([y[:n] for y, n in zip(b, lengths, strict=True)]).view(a.shape)
    error = float((a.float() - b.float()).norm() / b.float().norm())
    assert error < (1e-5 if spec.dtype == "fp32" else 2e-2)


@pytest.mark.parametrize("T", [24, 64, 512, 4096])
def test_lengths_add_up(T):
    for variant in ("padded", "full"):
        lengths = bench_attention.lengths_of(T, variant)
        assert sum(lengths) == T
        assert min(lengths) > 0
        assert max(lengths) <= 128
    assert len(set(bench_attention.lengths_of(T, "padded"))) > 1
    assert bench_attention.lengths_of(512, "full") == (128,) * 4


def test_the_gate_refuses_a_wrong_kernel(monkeypatch):
    case = bench("layer_norm").build(Spec("layer_norm", 16, 32))
    cost = opbench.cost_of("layer_norm", case.ours)
    assert opbench.gate("layer_norm", case.ours, cost) == "fp64 reference"
    right = functional.layer_norm

    def wrong(**kwargs):
        # the gate computes the truth in fp64 with the same public op
        return right(**kwargs) * (1.0 if kwargs["x"].dtype == torch.float64 else 1.001)

    monkeypatch.setattr(functional, "layer_norm", wrong)
    with pytest.raises(AssertionError, match="error"):
        opbench.gate("layer_norm", case.ours, cost)
    monkeypatch.setattr(opbench, "AFFORDABLE", 0)
    with pytest.raises(AssertionError, match="not timed"):
        opbench.gate("layer_norm", case.ours, cost)
    monkeypatch.setattr(functional, "layer_norm", right)
    assert opbench.gate("layer_norm", case.ours, cost) == "stock"


def test_goals():
    assert opbench.goal("linear", "", 64, "forward") == {"overhead_us": 10.0}
    assert opbench.goal("linear", "", 512, "forward") == {"ratio": 1.0}
    assert opbench.goal("bias_gelu", "", 4096, "forward") == {"ratio": 1.0}
    assert opbench.goal("bias_gelu", "", 4096, "backward") == {"ratio": 1.5}
    assert opbench.goal("dropout_add_layer_norm", "", 512, "forward") == {"ratio": 1.5}
    assert opbench.goal("cross_entropy", "", 512, "both") == {"ratio": 1.5}
    assert opbench.goal("attention", "padded-dropout", 512, "both") == {"ratio": 1.5}
    assert opbench.goal("attention", "full", 512, "both") == {"ratio": 1.0}


def test_a_row_is_measured_against_the_better_peer():
    r = row(ours=10.0, eager=20.0, compiled=15.0)
    assert r["ratio_to_best"] == r["ratio_to_compiled"] == pytest.approx(1.5)
    assert r["ratio_to_eager"] == pytest.approx(2.0)
    assert r["ratio_low"] < 1.5 < r["ratio_high"]
    assert r["met"]
    assert not row(ours=10.0, eager=9.0, compiled=15.0)["met"]
    assert not row("cross_entropy", ours=10.0, eager=14.9, compiled=15.0)["met"]


def test_small_calls_are_measured_by_their_overhead_over_eager():
    assert row(T=64, ours=29.0, eager=20.0, compiled=5.0)["met"]
    late = row(T=64, ours=31.0, eager=20.0, compiled=50.0)
    assert late["overhead_us"] == pytest.approx(11.0)
    assert not late["met"]


def test_rates_are_shares_of_the_peak_that_bounds():
    r = row(ours=10.0)
    # 1e5 bytes in 10 us are 10 GB/s, the peak of a copy; 1e5 operations are 10 of 100 GFLOP/s
    assert (r["gb_per_s"], r["gflop_per_s"]) == pytest.approx((10.0, 10.0))
    assert (r["bound"], r["percent_of_peak"]) == ("memory", pytest.approx(100.0))
    both = row(ours=10.0, direction="both")
    assert (both["gb_per_s"], both["gflop_per_s"]) == pytest.approx((20.0, 40.0))


def test_partial_runs_merge(tmp_path):
    path = tmp_path / "ops.json"
    first = opbench.Store(path, MACHINE, PEAKS)
    first.add([row("mlm_loss"), row("embed"), row("embed", direction="backward")])
    second = opbench.Store(path, MACHINE, {**PEAKS, "copy_gb_per_s": 11.0})
    second.add([row("embed", ours=5.0)])
    kept = json.loads(path.read_text())
    assert [(r["op"], r["direction"], r["run"]) for r in kept["rows"]] == [
        ("embed", "forward", "2"),
        ("embed", "backward", "1"),
        ("mlm_loss", "forward", "1"),
    ]
    assert kept["rows"][0]["microseconds"]["fastbert"]["median"] == pytest.approx(5.0)
    assert kept["runs"]["2"]["peaks"]["copy_gb_per_s"] == 11.0
    opbench.Store(path, MACHINE, PEAKS).add([row("mlm_loss"), row("embed", direction="backward")])
    assert json.loads(path.read_text())["runs"].keys() == {"2", "3"}


def test_the_page_and_the_plot(tmp_path):
    store = opbench.Store(tmp_path / "ops.json", MACHINE, PEAKS)
    store.add(
        [
            row("attention", variant="padded", ours=10.0),
            row("attention", variant="padded", T=4096, ours=14.0),
            row("cross_entropy", C=30522, ours=100.0),
            row("linear", T=64, ours=40.0),
        ]
    )
    results = json.loads(store.path.read_text())
    page = tables.document(results)
    assert "| attention, padded | fp32 | forward | 1.07 to 1.50x | 1.5x | 1 of 2 |" in page
    assert "| linear | 768 | fp32 | forward | 40.0 | 20.0 | +20.0 | **no** |" in page
    assert "4 rows, 3 miss their goal." in page
    assert "some chip" in page
    tables.plot(results["rows"], "fp32", tmp_path / "ops.png")
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


def test_a_round_times_forward_and_backward_of_every_call():
    calls = []

    def pair(name):
        return (lambda: calls.append(name) or name), (lambda y: calls.append(y + "'"))

    pairs = {n: pair(n) for n in "ab"}
    times = interleave_training(pairs, 0.0, (3, 5))
    assert calls == ["a", "a'", "b", "b'", "b", "b'", "a", "a'", "a", "a'", "b", "b'"]
    assert all(t.rounds == 3 for timed in times.values() for t in timed.values())
    assert times["a"]["both"].median >= times["a"]["forward"].median
    calls.clear()
    interleave_training(pairs, 60.0, (1, 4))
    assert len(calls) == 16
    with pytest.raises(ValueError, match="nothing can be timed"):
        interleave_training({}, 1.0)


def test_peaks(monkeypatch):
    monkeypatch.setattr(peaks, "_GEMMS", ((64, 96, 32), (32, 64, 64)))
    found = peaks.peaks(0.2)
    assert found["threads"] == torch.get_num_threads()
    assert {"gflops_fp32", "gflops_bf16", "copy_gb_per_s"} <= found.keys()
    assert all(value > 0 for value in found.values())
    if cpu.native is not None:
        assert "fma_gflops_fp32" in found


@pytest.mark.skipif(cpu.native is None, reason=str(cpu.unavailable))
def test_wider_vectors_have_a_higher_peak():
    default, found = cpu.native.isa(), {}
    try:
        for isa in cpu.native.isas():
            cpu.native.use_isa(isa)
            found[isa] = cpu.native.fma_peak(1)
            assert (cpu.native.dot_peak(1) > 0) == (isa in ("avx512_bf16", "emulated"))
    finally:
        cpu.native.use_isa(default)
    assert min(found.values()) > 0
    # an AVX2 multiply-add does four times the arithmetic of an SSE multiplication or addition
    if "avx2" in found:
        assert found["avx2"] > 1.5 * found["baseline"]
