"""relation_loss against length: `python -m benchmarks.models.relations [--parts memory times] [--quick]`.

Ours beside the loss written out in torch, forward + backward, fp32, as in MiniLMv2: 12 relation heads.
memory: the peak over one sequence of S tokens, each in a process of its own. times: 4096 tokens as sequences of S,
interleaved. Writes relations.json, whose other part stays as it is, and relations.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS, ROOT
from benchmarks.models.scaling import Pair, pair, resident, slope
from benchmarks.ops.bench_relation_loss import stock
from fastbert import functional
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.testing.timing import interleave_training

HEADS = 12
NAMES = ("fastbert", "written out")
MEMORY_LENGTHS = tuple(2**i for i in range(7, 13))
TOKENS = 4096
TIME_LENGTHS = tuple(2**i for i in range(4, 13))
SIZES = (32, 64)


def pairs(sequences: int, S: int, D: int) -> dict[str, Pair]:
    """Each implementation's (forward, backward) on the same relations of heads of D."""
    torch.manual_seed(0)
    student = torch.randn(sequences * S, HEADS * D).requires_grad_()
    teacher = torch.randn(sequences * S, HEADS * D)
    bounds = torch.arange(0, sequences * S + 1, S, dtype=torch.int32)

    def ours() -> Tensor:
        return functional.relation_loss(student, teacher, bounds, S, HEADS)

    def written_out() -> Tensor:
        z, of_teacher = (t.view(sequences, S, HEADS * D) for t in (student, teacher))
        return stock(z, of_teacher, None, HEADS)

    return {"fastbert": pair(ours, [student]), "written out": pair(written_out, [student])}


def measure_memory(name: str, S: int) -> int:
    """The peak of memory above its level before the call, in this fresh process."""
    for length in (64, S):
        # the short call loads libraries and starts threads before memory is counted
        forward, backward = pairs(1, length, 64)[name]
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        backward(forward())
    return resident("VmHWM") - before


def memory(quick: bool) -> list[dict[str, Any]]:
    """The peak of both at every length."""
    rows = []
    for S in MEMORY_LENGTHS[: 2 if quick else None]:
        for name in NAMES:
            command = [sys.executable, "-m", "benchmarks.models.relations"]
            command += ["--measure", name, str(S)]
            # memory that malloc keeps of the short call would hide some of the peak
            env = os.environ | {"FASTBERT_KEEP_MEMORY": "0"}
            run = subprocess.run(
                command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
            )
            rows.append({"S": S, "name": name, "peak_bytes": int(run.stdout)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def agree(calls: dict[str, Pair]) -> None:
    """Raise AssertionError where the implementations' losses or gradients differ."""
    found = []
    for forward, backward in calls.values():
        loss = forward()
        found.append((loss.detach(), *backward(loss)))
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4, "the losses disagree: not timed"


def times(quick: bool) -> list[dict[str, Any]]:
    """Seconds of both at every length and size of a head, and written out / ours."""
    tokens, seconds = (128, 0.0) if quick else (TOKENS, 4.0)
    rows = []
    for D in SIZES:
        for S in TIME_LENGTHS:
            if tokens < S:
                continue
            calls = pairs(tokens // S, S, D)
            agree(calls)
            found = interleave_training(calls, seconds)
            taken = {n: {d: vars(t[d]) for d in ("forward", "both")} for n, t in found.items()}
            ours, theirs = (taken[n]["both"]["median"] for n in NAMES)
            rows.append({"T": tokens, "S": S, "D": D, "seconds": taken, "ratio": theirs / ours})
            print(json.dumps(rows[-1]), flush=True)
    return rows


PARTS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {"memory": memory, "times": times}


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel for each part that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.5), squeeze=False)
    for panel, (part, found) in zip(axes[0], results.items(), strict=True):
        (_draw_memory if part == "memory" else _draw_times)(panel, found["rows"])
        m = found["machine"]
        panel.set_title(f"{panel.get_title()}\n{m['cpu']}, {m['threads']} threads, {m['date']}")
        panel.set(xlabel="tokens of a sequence, S", yscale="log")
        panel.set_xscale("log", base=2)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_memory(panel: Any, rows: list[dict[str, Any]]) -> None:
    for name in NAMES:
        points = [(r["S"], max(r["peak_bytes"], 1) / 1e6) for r in rows if r["name"] == name]
        growth = f", ~S^{slope(points):.1f}" if len(points) > 1 else ""
        panel.plot(*zip(*points, strict=True), marker="o", ms=4, label=name + growth)
    panel.set(title="relation_loss: peak memory over its inputs", ylabel="MB")


def _draw_times(panel: Any, rows: list[dict[str, Any]]) -> None:
    for D in dict.fromkeys(r["D"] for r in rows):
        for name, style in zip(NAMES, ("-", "--"), strict=True):
            of_size = [r for r in rows if r["D"] == D]
            ms = [1e3 * r["seconds"][name]["both"]["median"] for r in of_size]
            panel.plot(
                [r["S"] for r in of_size],
                ms,
                style,
                marker="o",
                ms=4,
                label=f"{name}, heads of {D}",
            )
    panel.set(title=f"relation_loss: {rows[0]['T']} tokens, forward + backward", ylabel="ms")


def main() -> int:
    """Measure, write, plot; with --measure one peak of memory in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a few short lengths, to see it run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "S"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, S = options.measure
        print(measure_memory(name, int(S)))
        return 0
    path = options.out / "relations.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measured = {
        part: {"machine": machine_info(), "rows": PARTS[part](options.quick)}
        for part in options.parts
    }
    results = {part: (before | measured)[part] for part in PARTS if part in before | measured}
    write_text(path, json.dumps(results, indent=1) + "\n")
    plot(results, options.out / "relations.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
