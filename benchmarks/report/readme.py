"""Writes the measured tables of README.md and docs/benchmarks.md, and the plots, from benchmarks/results/bert.json.

With --check it only says by its exit status whether the tables are up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.models.works import NO_BF16

IN_TABLE = ("speed", "of padded", "of fp32", "of peak")
COLUMNS = 120
BEGIN, END = "<!-- table: python -m benchmarks.report.readme -->", "<!-- end of table -->"


def duration(seconds: float) -> str:
    """Milliseconds below a second, else seconds."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def verdict(goal: dict[str, Any]) -> str:
    """A goal, and whether it is met."""
    said = "met" if goal["met"] else "**missed**" if goal["value"] is not None else "not measured"
    shown = "" if goal["value"] is None else f" ({goal['value']:.0%})"
    times = "" if goal["value"] is None else f" ({goal['value']:.2f}x)"
    return {
        "speed": f"{goal['goal']:g}x: {said}",
        "of padded": f"{goal['goal']:g}x of those that compute padding{times}: {said}",
        "of fp32": f"{goal['goal']:g}x of our fp32{times}: {said}",
        "of peak": f"{goal['goal']:.0%} of peak{shown}: {said}",
        "memory": f"goal {goal['goal']:.0%}: {said}",
        "saved": f"goal {goal['goal']:.0%}: {said}",
    }[goal["what"]]


def speedup(row: dict[str, Any]) -> str:
    """The ratio with its band, or why there is none."""
    if row["ratio"]:
        return "{median:.2f}x ({p20:.2f} to {p80:.2f})".format(**row["ratio"])
    ours = row["results"].get("fastbert", {"reason": "not measured"})
    if "reason" in ours:
        return ours["reason"]
    if incomparable(row):
        return NO_BF16
    slow = [f"{n}: {r['reason']}" for n, r in row["results"].items() if _slow(r)]
    if row["best_peer"] is None:
        return "; ".join(slow) or "no peer agrees"
    return "fastbert does not agree"


def _slow(result: dict[str, Any]) -> bool:
    return result.get("reason", "").startswith("left out")


def incomparable(row: dict[str, Any]) -> bool:
    """Whether the row is in bf16 and the CPU has no bf16 instructions."""
    return any(r.get("reason") == NO_BF16 for r in row["results"].values())


def in_order(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the results: first rows with peers, then rows that fastbert runs alone."""
    return sorted(results["rows"], key=incomparable)


def short_table(results: dict[str, Any]) -> str:
    """The table of the README: a line per work, with the best peer and the goal; then memory, machine and date.

    Rows that can't be compared are in docs/benchmarks.md only.
    """
    lines = [
        "| BERT-base | | fastbert | best peer | speed-up | goal |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if incomparable(row):
            continue
        seconds = {
            n: duration(r["seconds"]["median"]) for n, r in row["results"].items() if "seconds" in r
        }
        best = row["best_peer"]
        cells = [
            row["title"],
            row["precision"],
            seconds.get("fastbert", "--"),
            f"{best} {seconds[best]}" if best else "--",
            speedup(row),
            "; ".join(verdict(g) for g in row["goals"] if g["what"] in IN_TABLE) or "--",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", filled(" ".join([*memory_lines(results), footnote(results)]))])


def filled(text: str) -> str:
    """A paragraph, or an item of a list, in lines of at most COLUMNS."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        text, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def memory_lines(results: dict[str, Any]) -> list[str]:
    """Sentences on peak memory and on bytes saved for backward, against stock, where these have goals."""
    lines = []
    for row in results["rows"]:
        work = f"{row['title']}, {row['precision']}"
        goals = {goal["what"]: goal for goal in row["goals"] if goal["value"] is not None}
        if goal := goals.get("memory"):
            lines.append(
                f"Peak memory, {work}: {row['memory_ratio']['peak']:.0%} of stock's process, "
                f"{row['memory_ratio']['added']:.0%} of what its step adds ({verdict(goal)})."
            )
        if goal := goals.get("saved"):
            mine, theirs = (row["saved_bytes"][name] / 1e3 for name in ("fastbert", "sdpa"))
            lines.append(
                f"Saved for backward per token and layer, {work}: {mine:.1f} KB, {goal['value']:.1%} of "
                f"stock's {theirs:.1f} KB ({verdict(goal)})."
            )
    return lines


def footnote(results: dict[str, Any]) -> str:
    """The date, the machine and the protocol."""
    m, v = results["machine"], results["machine"]["versions"]
    rounds = sorted({row["rounds"] for row in results["rows"]})
    dates = sorted({row["date"] for row in results["rows"]})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    counts = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return (
        f"{span}, {m['cpu']} ({m['instructions']}), {m['threads']} threads, torch {v['torch']}, transformers "
        f"{v['transformers']}. Medians of {counts} interleaved rounds, in brackets p20 to p80. All peers, bf16: "
        "[docs/benchmarks.md](docs/benchmarks.md)."
    )


def full_table(results: dict[str, Any]) -> str:
    """The tables of docs/benchmarks.md: a row for each peer of a benchmark, or the reason why the peer did not run."""
    lines = []
    for row in in_order(results):
        lines += [
            f"**{row['title']}, {row['precision']}** ({row['fill_percent']} % real tokens)",
            "",
        ]
        lines += ["| | median | p20 to p80 | agreement | of FMA peak |", "|---|---|---|---|---|"]
        failed = []
        order = lambda item: item[1].get("seconds", {}).get("median", float("inf"))  # noqa: E731
        for name, result in sorted(row["results"].items(), key=order):
            if "reason" in result:
                failed.append(f"{name}: {result['reason']}")
                continue
            s = result["seconds"]
            ((kind, value),) = result["agreement"].items()
            close = f"cosine {value:.6f}" if kind == "cosine" else f"loss within {value:.1e}"
            share = f"{result['of_peak']:.0%}" if "of_peak" in result else "--"
            note = "" if result["counted"] or name.startswith("fastbert") else " (not counted)"
            band = f"{duration(s['p20'])} to {duration(s['p80'])}"
            lines.append(f"| {name}{note} | {duration(s['median'])} | {band} | {close} | {share} |")
        lines += ["", *(f"- {reason}" for reason in failed), ""]
    used = sorted(
        {f"{p} {v}" for found in results["environments"].values() for p, v in found.items()}
    )
    return "\n".join([*lines, filled(f"Versions: {', '.join(used)}.")])


def replaced(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """The text with another table between the markers."""
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"


def pages(results: dict[str, Any]) -> dict[Path, str]:
    """{file: its text with the current tables}."""
    tables = {"README.md": short_table(results), "docs/benchmarks.md": full_table(results)}
    return {ROOT / n: replaced((ROOT / n).read_text(), t) for n, t in tables.items()}


def main() -> int:
    """Rewrite the pages and plots, or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    results = json.loads((RESULTS / "bert.json").read_text())
    wanted = pages(results)
    if options.check:
        return int(any(path.read_text() != text for path, text in wanted.items()))
    from benchmarks.report.plots import draw

    for path, text in wanted.items():
        path.write_text(text)
    draw(results, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
