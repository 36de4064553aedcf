"""Shared by the op benchmarks: a case, its gate, timing, rows and goals, and the file of results.

A benchmark file names its cases as `GRID` and turns each into a call by `build(spec)`; its test is one call of
`run_case`. Forward is timed with inputs that require gradients, as in training; backward runs on the graph just built.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastbert
from benchmarks import RESULTS
from fastbert import functional
from fastbert.backend import chooser
from fastbert.backend.reference.samples import Cost
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.testing.budget import assert_within_budget
from fastbert.testing.parity import call, detached, leaves_of, tree_map
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import Timing, interleave_training

OPS_JSON = RESULTS / "ops.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS, HIDDEN = (64, 512, 4096), (384, 768, 1024)
VOCAB, HEAD = 30522, 64
# without bf16 instructions stock's bf16 GEMM and its backward run at a hundredth of the fp32 speed
FAST_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
BF16_GEMM = ((512,), (768,)) if FAST_BF16 else ((512,), (384,))
# floating-point operations of forward and backward up to which the fp64 reference takes a few seconds on a CPU
AFFORDABLE = 6e10
# (op, direction) with the goal of 1.5 times the speed of the better of eager and compiled
HALF_MORE = {
    ("dropout_add_layer_norm", "forward"),
    ("dropout_add_layer_norm", "backward"),
    ("dropout_add_layer_norm", "both"),
    ("bias_gelu", "backward"),
    ("cross_entropy", "forward"),
    ("cross_entropy", "backward"),
    ("cross_entropy", "both"),
}
OVERHEAD_US = 10.0


@dataclass(frozen=True)
class Spec:
    """One cell of a benchmark's grid; C is the op's width (V for cross_entropy)."""

    slug: str
    T: int
    C: int
    dtype: str = "fp32"
    variant: str = ""

    @property
    def id(self) -> str:
        """The test's id, e.g. padded-T512-C768-fp32."""
        return "-".join(filter(None, [self.variant, f"T{self.T}", f"C{self.C}", self.dtype]))


@dataclass(frozen=True)
class Case:
    """Keyword arguments of our op; the function and arguments of stock torch for the same result."""

    ours: dict[str, Any]
    stock: Callable[..., Any]
    stock_args: dict[str, Any]


def grid(
    slug: str,
    tokens: Iterable[int] = TOKENS,
    widths: Iterable[int] = HIDDEN,
    dtype: str = "fp32",
    variant: str = "",
) -> list[Spec]:
    """Every T with every C."""
    widths = tuple(widths)
    return [Spec(slug, T, C, dtype, variant) for T in tokens for C in widths]


def pair(op: Callable[..., Any], args: dict[str, Any]) -> tuple[Callable, Callable]:
    """Two calls, forward and backward, of the op. Float inputs require gradients, and backward returns these."""
    args = detached(args)
    leaves = [leaf for _, leaf in leaves_of(args)]
    upstream: list[Tensor] = []

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        if not upstream:
            upstream.append(torch.randn_like(y))
        grads = torch.autograd.grad(y, leaves, upstream[0], allow_unused=True)
        return tuple(g for g in grads if g is not None)

    return lambda: op(**args), backward


def reference_of(slug: str) -> Any:
    """The module of the op's specification."""
    return importlib.import_module(f"fastbert.backend.reference.{slug}")


def cost_of(slug: str, ours: dict[str, Any]) -> Cost:
    """The least bytes and operations of the call; options that do not change them are left out."""
    options = ("p", "seed", "site")
    return reference_of(slug).cost(**{k: v for k, v in ours.items() if k not in options})


def gate(slug: str, ours: dict[str, Any], cost: Cost) -> str:
    """Refuse wrong outputs or gradients; returns the truth that was used: "fp64 reference" or "stock".

    Where fp64 takes too long on a CPU, stock is the truth, and the error may be 1e-4 of the norm in fp32, 3e-2 in bf16.
    """
    op = getattr(functional, slug)
    results = call(op, ours, backward=True)
    stock = call(reference_of(slug).eager, ours, backward=True)
    on_cpu = next(leaves_of(ours))[1].device.type == "cpu"
    if on_cpu and cost.forward_flops + cost.backward_flops > AFFORDABLE:
        for name, value in results.items():
            a, b = value.float(), stock[name].float()
            allowed = (1e-4 if value.dtype == torch.float32 else 3e-2) * float(b.norm())
            assert float((a - b).norm()) <= allowed, f"{slug} {name} is wrong: not timed"
        return "stock"
    wide = {
        k: tree_map(v, lambda t: t.double() if t.is_floating_point() else t)
        for k, v in ours.items()
    }
    with fastbert.use("reference"):
        truth = call(op, wide, backward=True)
    for name, value in results.items():
        assert_within_budget(f"{slug} {name}", value, truth[name], stock[name])
    return "fp64 reference"


def chosen_backend(slug: str, ours: dict[str, Any]) -> str:
    """The backend that runs this call with inputs that require gradients."""
    with contextlib.redirect_stdout(io.StringIO()):
        reasons = fastbert.explain(slug, **detached(ours))
    order = (chooser.forced(),) if chooser.forced() else chooser.ORDER["cpu"]
    return next(name for name in order if reasons[name] is None)


def measure(slug: str, case: Case, seconds: float) -> dict[str, dict[str, Timing]]:
    """Times our op, stock eager and stock compiled for exactly these shapes, interleaved."""
    torch.compiler.reset()
    pairs = {
        "fastbert": pair(getattr(functional, slug), case.ours),
        "eager": pair(case.stock, case.stock_args),
        "compiled": pair(torch.compile(case.stock, dynamic=False), case.stock_args),
    }
    # compiles; the gate has run the other two
    forward, backward = pairs["compiled"]
    backward(forward())
    return interleave_training(pairs, seconds)


def goal(slug: str, variant: str, T: int, direction: str) -> dict[str, float]:
    """A row's goal: {"overhead_us": most} at T = 64, else {"ratio": least}."""
    if T < 512:
        return {"overhead_us": OVERHEAD_US}
    padded = slug == "attention" and variant.startswith("padded")
    return {"ratio": 1.5 if padded or (slug, direction) in HALF_MORE else 1.0}


def rate(direction: str, seconds: float, cost: Cost, dtype: str, peaks: dict) -> dict[str, Any]:
    """GB/s, GFLOP/s, and the percentage of the peak that bounds the call: copying or the dtype's GEMM."""
    moved = {"forward": cost.forward_bytes, "backward": cost.backward_bytes}
    flops = {"forward": cost.forward_flops, "backward": cost.backward_flops}
    moved["both"], flops["both"] = sum(moved.values()), sum(flops.values())
    gb, gflop = moved[direction] / seconds / 1e9, flops[direction] / seconds / 1e9
    shares = {"memory": gb / peaks["copy_gb_per_s"], "compute": gflop / peaks[f"gflops_{dtype}"]}
    bound = max(shares, key=lambda name: shares[name])
    return {
        "gb_per_s": gb,
        "gflop_per_s": gflop,
        "bound": bound,
        "percent_of_peak": 100 * shares[bound],
    }


def row(
    spec: Spec, direction: str, times: dict[str, Timing], cost: Cost, peaks: dict
) -> dict[str, Any]:
    """The results of one direction of one case; a ratio above 1 means that our op is faster."""
    ours = times["fastbert"]
    best = min((times["eager"], times["compiled"]), key=lambda t: t.median)
    wanted = goal(spec.slug, spec.variant, spec.T, direction)
    overhead = (ours.median - times["eager"].median) * 1e6
    ratio = best.median / ours.median
    met = overhead <= wanted["overhead_us"] if "overhead_us" in wanted else ratio >= wanted["ratio"]
    return {
        "op": spec.slug,
        "variant": spec.variant,
        "T": spec.T,
        "C": spec.C,
        "dtype": spec.dtype,
        "direction": direction,
        "microseconds": {
            name: {"median": t.median * 1e6, "p20": t.p20 * 1e6, "p80": t.p80 * 1e6}
            for name, t in times.items()
        },
        "rounds": ours.rounds,
        "ratio_to_eager": times["eager"].median / ours.median,
        "ratio_to_compiled": times["compiled"].median / ours.median,
        "ratio_to_best": ratio,
        "ratio_low": best.p20 / ours.p80,
        "ratio_high": best.p80 / ours.p20,
        "overhead_us": overhead,
        "goal": wanted,
        "met": bool(met),
        **rate(direction, ours.median, cost, spec.dtype, peaks),
    }


def key(row: dict[str, Any]) -> tuple:
    """The fields that identify a measurement across runs."""
    return tuple(row[name] for name in ("op", "variant", "dtype", "T", "C", "direction"))


class Store:
    """The file of results. A row replaces that of the same case from an earlier run and names its own run.

    {"runs": {id: {machine, peaks}}, "rows": [...]}; a run that no row names any more is dropped.
    """

    def __init__(self, path: Path, machine: dict[str, Any], peaks: dict[str, float]) -> None:
        self.path, self.peaks = path, peaks
        known = json.loads(path.read_text()) if path.exists() else {"runs": {}, "rows": []}
        self._runs, self._rows = known["runs"], {key(r): r for r in known["rows"]}
        numbers = [int(name) for name in self._runs]
        self._run = str(max(numbers, default=0) + 1)
        self._runs[self._run] = {"machine": machine, "peaks": peaks}
        self.new: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Merge rows and write the file, so that an interrupted run loses nothing."""
        for r in rows:
            self._rows[key(r)] = {**r, "run": self._run}
        self.new += rows
        merged = [self._rows[k] for k in sorted(self._rows, key=order)]
        used = {r["run"] for r in merged}
        runs = {name: run for name, run in self._runs.items() if name in used}
        text = json.dumps({"runs": runs, "rows": merged}, indent=1) + "\n"
        write_text(self.path, text)


def order(k: tuple) -> tuple:
    """The sort key of a row's key: the ops' order, then variant, dtype, sizes and direction."""
    slug, variant, dtype, T, C, direction = k
    directions = ("forward", "backward", "both")
    return (
        chooser.SLUGS.index(slug),
        variant,
        dtype != "fp32",
        T,
        C,
        directions.index(direction),
    )


def run_case(benchmark: Any, store: Store, spec: Spec, case: Case, seconds: float) -> None:
    """Gate, time, store: the body of every op benchmark."""
    cost = cost_of(spec.slug, case.ours)
    facts = {"gate": gate(spec.slug, case.ours, cost)}
    facts["backend"] = chosen_backend(spec.slug, case.ours)
    times = measure(spec.slug, case, seconds)
    rows = []
    for direction in ("forward", "backward", "both"):
        taken = {name: t[direction] for name, t in times.items()}
        rows.append({**row(spec, direction, taken, cost, store.peaks), **facts})
    store.add(rows)
    benchmark.extra_info.update({r["direction"]: r for r in rows})
    forward, backward = pair(getattr(functional, spec.slug), case.ours)
    # for pytest-benchmark's own report; the comparison is the interleaved one above
    benchmark.pedantic(lambda: backward(forward()), rounds=1)


def line(r: dict[str, Any]) -> str:
    """One row in plain text."""
    us = {name: t["median"] for name, t in r["microseconds"].items()}
    name = f"{r['op']}{'/' + r['variant'] if r['variant'] else ''}"
    if "ratio" in r["goal"]:
        verdict = f"{r['ratio_to_best']:5.2f}x, goal {r['goal']['ratio']}x"
    else:
        verdict = f"{r['overhead_us']:+7.1f} us, goal {r['goal']['overhead_us']:.0f} us"
    return (
        f"{name:<28} T{r['T']:<5} C{r['C']:<6} {r['dtype']} {r['direction']:<8} "
        f"{us['fastbert']:>11.1f} {us['eager']:>11.1f} {us['compiled']:>11.1f} us "
        f"{r['percent_of_peak']:4.0f} % of {r['bound']:<7} {verdict}{'' if r['met'] else '  MISSED'}"
    )


def keep_memory() -> None:
    """Make glibc's malloc keep freed memory, so that all calls have the same conditions.

    By default malloc maps memory anew for tensors of some sizes, depending on earlier calls, at 4 us per 4 KB page in a
    virtual machine. The measured time is then mostly page faults.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_max, trim_threshold = -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def new_store(path: Path, seconds: float) -> Store:
    """The store of a session, its peaks measured now."""
    keep_memory()
    return Store(path, machine_info(), peaks(seconds))
