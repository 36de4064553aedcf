"""A whole BERT-base, end to end, beside its peers: `python -m benchmarks.models.bench_bert --help`.

Every peer runs in its own process (peers/worker.py) and, if it needs one, its own environment; rounds are interleaved.
Rows are merged into a JSON; benchmarks.report.readme makes tables and plots of it. docs/benchmarks.md
explains the measurement.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.models.saved import against_stock
from benchmarks.models.summary import earlier, row
from benchmarks.models.works import (
    NO_BF16,
    OURS,
    PEERS,
    STOCK,
    WORKS,
    Peer,
    Work,
    make_inputs,
    make_models,
)
from benchmarks.peers.driver import Handle, Limits, Outcome, Race, WorkerError
from benchmarks.peers.install import find
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.testing.peaks import peaks

BERT_JSON = RESULTS / "bert.json"


def arguments() -> argparse.Namespace:
    """The command line; its patterns are replaced by the names that they match."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns, such as 'infer-*-fp32'")
    parser.add_argument("--peers", nargs="+", default=["*"], help="patterns, such as 'fastbert*'")
    parser.add_argument("--rounds", type=int, help="instead of each row's own number")
    parser.add_argument(
        "--limit", type=float, help="leave out calls longer than this, instead of each row's own"
    )
    parser.add_argument("--timeout", type=float, default=900, help="for loading and compiling")
    parser.add_argument(
        "--out", type=Path, default=BERT_JSON, help="JSON that rows are merged into"
    )
    parser.add_argument("--folder", type=Path, help="keeps converted models for the next run")
    parser.add_argument("--list", action="store_true", help="print the rows and peers")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds has to be at least 1")
    for flag, everybody in (("rows", WORKS), ("peers", PEERS)):
        names, found = [one.name for one in everybody], set()
        for pattern in getattr(options, flag):
            if not (matching := fnmatch.filter(names, pattern)):
                parser.error(f"--{flag} {pattern} matches none of {', '.join(names)}")
            found.update(matching)
        setattr(options, flag, found)
    return options


def starter(folder: Path) -> Any:
    """A function that starts the worker of a peer."""
    peers = {peer.name: peer for peer in PEERS}

    def start(name: str) -> Handle:
        env = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), HF_HUB_OFFLINE="1")
        # inductor's pool of compiling processes would still run after compilation
        env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        env.pop("PYTHONPATH", None)
        python: Path | None = Path(sys.executable)
        peer = peers[name]
        if peer.env is None:
            env["PYTHONPATH"] = str(ROOT)
        else:
            python, reason = find(peer.env)
            if python is None:
                raise WorkerError(reason)
        command = [str(python), str(ROOT / "benchmarks" / "peers" / "worker.py"), name]
        return Handle(command, folder / f"{name}.log", env)

    return start


def incomparable(work: Work, found: dict[str, float]) -> bool:
    """Whether only we are measured: peers in bf16 take minutes a step on a CPU without bf16 instructions."""
    return work.precision == "bf16" and "fma_gflops_bf16" not in found


def measure(
    work: Work, peers: list[Peer], options: argparse.Namespace, date: str, before: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """Run one row; `before` are the peaks measured just before it. They are measured again after it."""
    folder: Path = options.folder
    inputs = make_inputs(folder, work)
    race = Race(
        starter(folder),
        {
            "kind": work.kind,
            "precision": work.precision,
            "folder": str(folder),
            "inputs": str(inputs),
            "threads": torch.get_num_threads(),
        },
        batches=len(list(inputs.glob("batch*.npz"))),
        calls=work.calls,
        rounds=options.rounds or work.rounds,
        memory=work.kind != "infer",
        limits=Limits(options.timeout, options.limit or work.limit),
    )
    outcomes = race.run([peer.name for peer in peers])
    reason = NO_BF16 if incomparable(work, before) else "not asked for in this run"
    for peer in PEERS:
        if peer.takes(work) and peer not in peers:
            outcomes[peer.name] = Outcome(reason=reason)
    around = {"before": before, "after": peaks()}
    facts = {"date": date, "rounds": race.rounds, "peaks": around}
    # without the native module this would count stock's kernels
    if work.saved_goal and not (outcomes[OURS].reason or outcomes[STOCK].reason):
        facts["saved_bytes"] = against_stock(work.lengths, work.precision)
    return row(work, outcomes, inputs, facts), outcomes


def merge(results: dict[str, Any], new: dict[str, Any], outcomes: dict[str, Outcome]) -> None:
    """Put a row in its place, and record the versions that were used."""
    rows = {r["work"]: r for r in results["rows"]}
    rows[new["work"]] = new
    order = [work.name for work in WORKS]
    results["rows"] = [rows[name] for name in order if name in rows]
    for name, outcome in outcomes.items():
        if outcome.versions:
            results["environments"][name] = outcome.versions


def run(options: argparse.Namespace) -> bool:
    """Measure the chosen rows and save each that has a measurement; returns whether there was one."""
    facts = machine_info()
    results = earlier(options.out, facts, environments={}, rows=[])
    before = peaks()
    make_models(options.folder)
    saved = False
    for work in (work for work in WORKS if work.name in options.rows):
        peers = [peer for peer in PEERS if peer.name in options.peers and peer.takes(work)]
        if incomparable(work, before):
            peers = [peer for peer in peers if peer.name == OURS]
        print(f"{work.name}: {', '.join(p.name for p in peers) or 'no peer takes it'}", flush=True)
        if not peers:
            continue
        started = time.monotonic()
        new, outcomes = measure(work, peers, options, facts["date"], before)
        before = new["peaks"]["after"]
        report(new, time.monotonic() - started)
        if not any("seconds" in result for result in new["results"].values()):
            print("  nothing was measured: the row stays what it was", flush=True)
            continue
        merge(results, new, outcomes)
        write_text(options.out, json.dumps(results, indent=1) + "\n")
        saved = True
    return saved


def report(new: dict[str, Any], seconds: float) -> None:
    """A row for the terminal: speed with agreement beside it."""
    for name, result in sorted(
        new["results"].items(), key=lambda item: item[1].get("seconds", {}).get("median", 1e9)
    ):
        if "reason" in result:
            print(f"  {name:18} {result['reason']}")
            continue
        s, close = (
            result["seconds"],
            " ".join(f"{k} {v:.6g}" for k, v in result["agreement"].items()),
        )
        band = f"{s['p20'] * 1e3:9.1f} to {s['p80'] * 1e3:9.1f}"
        peak = f"  {result['of_peak']:.0%} of peak" if "of_peak" in result else ""
        print(f"  {name:18} {s['median'] * 1e3:9.1f} ms ({band})  {close}{peak}")
    around = (new["peaks"][when].get("fma_gflops_fp32", 0) for when in ("before", "after"))
    print("  FMA peak {:.0f} GFLOP/s before and {:.0f} after".format(*around))
    if new["ratio"]:
        r = new["ratio"]
        band = f"{r['p20']:.2f} to {r['p80']:.2f}"
        print(f"  {r['median']:.2f}x ({band}) of {new['best_peer']}")
    if new["memory_ratio"]:
        print("  memory: " + ", ".join(f"{k} {v:.2f}" for k, v in new["memory_ratio"].items()))
    for goal in new["goals"]:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}"
        met = "met" if goal["met"] else "missed"
        print(f"  goal: {goal['what']} {goal['goal']:g}, {met}: {value}")
    print(f"  took {seconds:.0f} s", flush=True)


def main() -> int:
    """Parse, measure; Ctrl-C ends all workers and keeps the rows that were finished. 1 if nothing was measured."""
    options = arguments()
    if options.list:
        print("rows:")
        for work in WORKS:
            print(f"  {work.name:24} {work.rounds:2} rounds, limit {work.limit:3g} s: {work.title}")
        print("peers:", *(p.name for p in PEERS), sep="\n  ")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-bert-") as scratch:
            options.folder = options.folder or Path(scratch)
            options.folder.mkdir(parents=True, exist_ok=True)
            return int(not run(options))
    except KeyboardInterrupt:
        print("stopped; finished rows are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
