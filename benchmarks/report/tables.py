"""Writes docs/benchmarks_ops.md and the PNGs from results/ops.json: `python -m benchmarks.report.tables [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.report.readme import filled

DOC = ROOT / "docs" / "benchmarks_ops.md"
DIRECTIONS = ("forward", "backward", "both")
INTRODUCTION = """\
This page compares each op with stock PyTorch on a CPU. `python -m benchmarks.report.tables` makes it from
`benchmarks/results/ops.json`, which `make bench` writes. A ratio is the time of the better of torch eager and
torch.compile (for exactly these shapes) over fastbert's, so that it is over 1 where fastbert is faster; times are
medians of interleaved rounds. Forward is timed with gradients wanted, as in training, backward on the graph just
built. A kernel that breaks the error budget is not timed. Percentages are of the peak that bounds the call, copying
or GEMM; calls that stay in a cache can pass 100 %. For cross_entropy T is the rows and C the vocabulary; bias_gelu
works on rows of 4C. Attention's lengths are 128, 30, 45, 22, 80, 17, 60, 33 in turn, which stock pads and masks;
"full" has no padding. mlm_loss has 15 % labelled rows, and stock's decoder runs on all rows."""
Rows = list[dict[str, Any]]


def name_of(r: dict[str, Any]) -> str:
    """The op and its variant."""
    return f"{r['op']}, {r['variant'].replace('-', ', ')}" if r["variant"] else r["op"]


def goal_of(r: dict[str, Any]) -> str:
    """The goal in words."""
    if "ratio" in r["goal"]:
        return f"{r['goal']['ratio']:.1f}x"
    return f"{r['goal']['overhead_us']:.0f} us"


def groups(rows: Rows) -> dict[tuple[str, str, str], Rows]:
    """Rows by (op with variant, dtype, direction), in the file's order."""
    found: dict[tuple[str, str, str], Rows] = {}
    for r in rows:
        found.setdefault((name_of(r), r["dtype"], r["direction"]), []).append(r)
    return found


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table."""
    rule = ["---"] * len(header)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


def summary(rows: Rows) -> list[str]:
    """One line per op and direction: the ratios at T >= 512 and how many meet their goal."""
    lines = []
    for (name, dtype, direction), members in groups(rows).items():
        large = [r for r in members if "ratio" in r["goal"]]
        if large:
            ratios = sorted(r["ratio_to_best"] for r in large)
            shares = sorted(r["percent_of_peak"] for r in large)
            met = sum(r["met"] for r in large)
            lines.append(
                [
                    name,
                    dtype,
                    direction,
                    f"{ratios[0]:.2f} to {ratios[-1]:.2f}x",
                    goal_of(large[0]),
                    f"{met} of {len(large)}",
                    f"{shares[0]:.0f} to {shares[-1]:.0f} %",
                ]
            )
    header = ["op", "dtype", "direction", "ratio", "goal", "met", "of the peak"]
    return markdown(header, lines)


def overheads(rows: Rows) -> list[str]:
    """The table of T = 64: microseconds over eager."""
    lines = [
        [
            name_of(r),
            str(r["C"]),
            r["dtype"],
            r["direction"],
            f"{r['microseconds']['fastbert']['median']:.1f}",
            f"{r['microseconds']['eager']['median']:.1f}",
            f"{r['overhead_us']:+.1f}",
            "yes" if r["met"] else "**no**",
        ]
        for r in rows
        if "overhead_us" in r["goal"]
    ]
    return markdown(["op", "C", "dtype", "direction", "us", "eager us", "over eager", "met"], lines)


def full(rows: Rows) -> list[str]:
    """The table of every row."""
    lines = []
    for r in rows:
        us = {name: f"{t['median']:.1f}" for name, t in r["microseconds"].items()}
        spread = r["microseconds"]["fastbert"]
        lines.append(
            [
                name_of(r),
                r["dtype"],
                f"{r['T']}",
                f"{r['C']}",
                r["direction"],
                f"{us['fastbert']} ({spread['p20']:.1f} to {spread['p80']:.1f})",
                us["eager"],
                us["compiled"],
                f"{r['ratio_to_eager']:.2f}",
                f"{r['ratio_to_compiled']:.2f}",
                f"{r['gb_per_s']:.1f}",
                f"{r['gflop_per_s']:.1f}",
                f"{r['percent_of_peak']:.0f} % {r['bound']}",
                r["backend"],
                r["run"],
                ("yes" if r["met"] else "**no**") + f" ({goal_of(r)})",
            ]
        )
    header = ["op", "dtype", "T", "C", "direction", "us (p20 to p80)", "eager", "compiled"]
    header += ["x eager", "x compiled", "GB/s", "GFLOP/s", "of the peak", "backend", "run", "goal"]
    return markdown(header, lines)


def machine_line(name: str, run: dict[str, Any]) -> str:
    """The machine of a run and its peaks."""
    m, p = run["machine"], run["peaks"]
    units = [f"{p[k]:.0f} {k[-4:]}" for k in ("fma_gflops_fp32", "fma_gflops_bf16") if k in p]
    fma = f", {' and '.join(units)} by multiply-adds on registers" if units else ""
    return filled(
        f"- run {name}: {m['date']}, {m['cpu']}, {m['instructions']}, {m['threads']} threads, torch "
        f"{m['versions']['torch']}; peaks measured with it: {p['gflops_fp32']:.0f} GFLOP/s fp32 and "
        f"{p['gflops_bf16']:.0f} bf16 by GEMM, {p['copy_gb_per_s']:.1f} GB/s by copying{fma}"
    )


def document(results: dict[str, Any]) -> str:
    """docs/benchmarks_ops.md."""
    rows = results["rows"]
    missed = sum(not r["met"] for r in rows)
    dtypes = sorted({r["dtype"] for r in rows}, reverse=True)
    parts = [
        "# The ops against stock PyTorch",
        "",
        INTRODUCTION,
        "",
        *(machine_line(name, run) for name, run in results["runs"].items()),
        "",
        f"{len(rows)} rows, {missed} miss their goal.",
        "",
        *(f"![ratios, {d}](../benchmarks/results/ops_{d}.png)" for d in dtypes),
        "",
        "## T of 512 and more",
        "",
        *summary(rows),
        "",
        "## T = 64: the overhead",
        "",
        *overheads(rows),
        "",
        "## Every row",
        "",
        *full(rows),
    ]
    return "\n".join(parts) + "\n"


def plot(rows: Rows, dtype: str, path: Path) -> None:
    """A heat-map of the ratios: ops and directions down, shapes across; a cross marks a missed goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    members = {k: v for k, v in groups(rows).items() if k[1] == dtype}
    # cross_entropy has other widths than the rest: it stands in the first column of its T
    widths = sorted({r["C"] for r in rows if r["dtype"] == dtype and r["op"] != "cross_entropy"})
    tokens = sorted({r["T"] for v in members.values() for r in v})
    columns = [(T, C) for T in tokens for C in widths or [0]]
    grid = np.full((len(members), len(columns)), np.nan)
    figure, axes = plt.subplots(figsize=(3.5 + 0.75 * len(columns), 1.5 + 0.24 * len(members)))
    for i, group in enumerate(members.values()):
        for r in group:
            C = r["C"] if r["C"] in widths else (widths or [0])[0]
            j = columns.index((r["T"], C))
            grid[i, j] = np.log2(r["ratio_to_best"])
            text = f"{r['ratio_to_best']:.2f}{'' if r['met'] else ' ×'}"
            axes.text(j, i, text, ha="center", va="center", fontsize=7)
    image = axes.imshow(grid, cmap="RdYlGn", vmin=-2, vmax=2, aspect="auto")
    axes.set_xticks(range(len(columns)), [f"T {T}\nC {C}" for T, C in columns], fontsize=7)
    axes.set_yticks(range(len(members)), [f"{n}, {d}" for n, _, d in members], fontsize=7)
    axes.set_title(f"speed against the better of eager and compiled, {dtype}; × misses its goal")
    axes.title.set_fontsize(8)
    figure.colorbar(image, label="log2 of the ratio")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    """Write the page and the plots; with --check return 1 where the page is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    file = RESULTS / "ops.json"
    if not file.exists():
        raise SystemExit(
            f"{file} is not there: `python -m pytest benchmarks/ops --benchmark-only` writes it"
        )
    text = document(results := json.loads(file.read_text()))
    if options.check:
        return int(not DOC.exists() or DOC.read_text() != text)
    DOC.write_text(text)
    for dtype in sorted({r["dtype"] for r in results["rows"]}):
        plot(results["rows"], dtype, RESULTS / f"ops_{dtype}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
