"""Users' scripts, unchanged and with fastbert's one line: `python -m benchmarks.models.scripts --help`.

mlm: Trainer and BERT-base from random weights on speeches; classify, tag: Trainer and MiniLM on movie sentences and
CoNLL-2003; encode: sentence-transformers. Every variant runs its whole script in its own process
(peers/script.py), which waits before each step, so that steps are interleaved. docs/accelerate.md has the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import RESULTS, ROOT
from benchmarks.models.summary import earlier
from benchmarks.peers.driver import Handle
from benchmarks.report.readme import filled, replaced
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.testing.timing import Timing, rotated

SCRIPTS_JSON = RESULTS / "scripts.json"
PAGE = ROOT / "docs" / "accelerate.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.scripts -->", "<!-- end of table -->"

# steps by default: one epoch of movie sentences and of CoNLL-2003
STEPS = {"mlm": 24, "classify": 252, "tag": 439, "encode": 4}
TITLES = {
    "mlm": "masked LM, Trainer, BERT-base",
    "classify": "movie sentences, Trainer, MiniLM",
    "tag": "CoNLL-2003, Trainer, MiniLM",
    "encode": "encode 5,000 sentences, sentence-transformers, MiniLM",
}
GOALS = {"mlm": 3.0, "classify": 1.5, "tag": 1.5, "encode": 1.5}
QUANTISED_GOAL = 2.5
VARIANTS = {
    "mlm": ("stock", "accelerated"),
    "classify": ("stock", "accelerated", "fastbert"),
    "tag": ("stock", "accelerated", "fastbert"),
    "encode": ("stock", "accelerated", "frozen", "quantised"),
}
# steps that are not timed: they import modules and allocate memory for the first time
WARM = {"mlm": 2, "classify": 5, "tag": 5, "encode": 0}
SECONDS = 3600.0
# the table shows the mean loss of this many last steps
LAST = 5


def run(work: str, steps: int, seed: int, precision: str) -> dict[str, dict[str, Any]]:
    """Run all variants in turns, step by step: {variant: its final figures and the seconds of its steps}."""
    variants = VARIANTS[work]
    env = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), HF_HUB_OFFLINE="1")
    env |= {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    handles: dict[str, Handle] = {}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-scripts-") as scratch:
        try:
            for name in variants:
                folder = Path(scratch, name)
                folder.mkdir()
                command = [
                    sys.executable,
                    str(ROOT / "benchmarks" / "peers" / "script.py"),
                    work,
                    name,
                ]
                handles[name] = Handle(command, Path(scratch, f"{name}.log"), env)
                job = {"folder": str(folder), "steps": steps, "seed": seed, "precision": precision}
                handles[name].ask(SECONDS, "load", **job)
            for step in range(steps):
                for name in rotated(list(variants), step):
                    seconds[name].append(handles[name].ask(SECONDS, "step")["seconds"])
            for name in variants:
                found[name] = {**handles[name].ask(SECONDS, "finish"), "seconds": seconds[name]}
            if work == "encode":
                _compare(found)
        finally:
            for handle in handles.values():
                handle.close()
    return found


def _compare(found: dict[str, dict[str, Any]]) -> None:
    """Replace the files of vectors by the least cosine of a vector to stock's."""
    vectors = {
        name: np.load(values.pop("vectors")).astype(np.float64) for name, values in found.items()
    }
    for name, x in vectors.items():
        y = vectors["stock"]
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        found[name]["cosine"] = float(((x * y).sum(1) / norms).min())


def summary(runs: list[dict[str, dict[str, Any]]], name: str, warm: int) -> dict[str, Any]:
    """A variant against stock: the ratio of its steps' times, its memory, and its metric or loss."""
    mine, stock = ([run[who] for run in runs] for who in (name, "stock"))
    ratios = [
        s / m
        for a, b in zip(stock, mine, strict=True)
        for s, m in zip(a["seconds"][warm:], b["seconds"][warm:], strict=True)
    ]
    found = {
        "speed": vars(Timing.of(ratios)),
        "peak": _mean(m["peak"] / s["peak"] for s, m in zip(stock, mine, strict=True)),
        "added": _mean(_added(m) / _added(s) for s, m in zip(stock, mine, strict=True)),
    }
    if "cosine" in mine[0]:
        found["cosine"] = min(run["cosine"] for run in mine)
    elif mine[0]["metric"] is not None:
        found["metrics"] = [run["metric"] for run in mine]
    else:
        found["loss"] = _mean(np.mean(run["losses"][-LAST:]) for run in mine)
    return found


def _mean(values: Iterable[Any]) -> float:
    return float(np.mean([*values]))


def _added(run: dict[str, Any]) -> int:
    return run["peak"] - run["before"]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| script | | speed-up of a step | goal | metric of each seed, or agreement | peak memory | what it adds |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in results["rows"].items():
        for name, found in row["variants"].items():
            lines.append(f"| {' | '.join(_cells(key, row, name, found))} |")
    m, v = results["machine"], results["machine"]["versions"]
    dates = " and ".join(sorted({row["date"] for row in results["rows"].values()}))
    footnote = (
        f"{dates}, {m['cpu']} ({m['instructions']}), {m['threads']} threads, torch {v['torch']}, transformers "
        f"{v['transformers']}: stock's seconds / ours of the same step, median, in brackets p20 to p80; memory as "
        "shares of stock's (VmHWM of the process while it trains or encodes)."
    )
    return "\n".join([*lines, "", filled(footnote)])


def _cells(key: str, row: dict[str, Any], name: str, found: dict[str, Any]) -> list[str]:
    work, speed = row["work"], found["speed"]
    goal = QUANTISED_GOAL if name == "quantised" else GOALS[work]
    reached = "--"
    if name != "stock":
        reached = f"{goal:g}x: {'met' if speed['median'] >= goal else '**missed**'}"
    if "cosine" in found:
        said = f"least cosine {found['cosine']:.6f}"
    elif "metrics" in found:
        said = ", ".join(f"{value:.4f}" for value in found["metrics"])
    else:
        said = f"loss of the last {LAST} steps {found['loss']:.3f}"
    return [
        f"{TITLES[work]}, {row['precision']}, {row['steps']} {'calls' if work == 'encode' else 'steps'}",
        name,
        "1" if name == "stock" else "{median:.2f}x ({p20:.2f} to {p80:.2f})".format(**speed),
        reached,
        said,
        f"{found['peak']:.0%}",
        f"{found['added']:.0%}",
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=STEPS, default=[*STEPS])
    parser.add_argument("--seeds", type=int, default=3, help="runs of classify and tag")
    parser.add_argument("--steps", type=int, help="instead of each work's own number")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--out", type=Path, default=SCRIPTS_JSON, help="JSON that rows are merged into"
    )
    options = parser.parse_args()
    for name in ("seeds", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}: it has to be at least 1")
    return options


def main() -> None:
    """Measure, print, and write the JSON; the page only where the JSON is the repository's."""
    options = arguments()
    facts = machine_info()
    results = earlier(options.out, facts, rows={})
    for work in options.works:
        steps = options.steps or STEPS[work]
        seeds = options.seeds if work in ("classify", "tag") else 1
        runs = []
        for seed in range(seeds):
            runs.append(run(work, steps, seed, options.precision))
            print(f"{work}, seed {seed}: done", flush=True)
        warm = min(WARM[work], steps - 1)
        row = {"work": work, "precision": options.precision, "steps": steps, "date": facts["date"]}
        row["variants"] = {name: summary(runs, name, warm) for name in VARIANTS[work]}
        results["rows"][f"{work}-{options.precision}"] = row
        write_text(options.out, json.dumps(results, indent=1) + "\n")
    print(table(results))
    if options.out == SCRIPTS_JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(results), BEGIN, END))


if __name__ == "__main__":
    main()
