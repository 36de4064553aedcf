"""The plots beside the tables: inference, training and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS, UNCOUNTED = "#c1440e", "#8a9ba8", "#d7dee3"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write those of bert-inference.png, bert-training.png and bert-memory.png that have rows; returns them."""
    rows = results["rows"]
    files = []
    for name, chosen in (
        ("inference", [r for r in rows if r["kind"] == "infer"]),
        ("training", [r for r in rows if r["kind"] != "infer"]),
    ):
        chosen = [r for r in chosen if any("seconds" in x for x in r["results"].values())]
        if chosen:
            files.append(_save(_times(chosen), folder / f"bert-{name}.png"))
    if any("memory" in x for r in rows for x in r["results"].values()):
        files.append(_save(_memory(rows), folder / "bert-memory.png"))
    return files


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _colour(name: str, result: dict[str, Any]) -> str:
    if name == "fastbert":
        return OURS
    return OTHERS if result["counted"] else UNCOUNTED


def _times(rows: list[dict[str, Any]]) -> Any:
    """One panel per work: median milliseconds with p20 to p80, fastest on top."""
    columns = min(2, len(rows))
    height = (len(rows) + columns - 1) // columns
    figure, axes = plt.subplots(
        height, columns, figsize=(5.5 * columns, 2.9 * height), squeeze=False
    )
    for axis, row in zip(axes.flat, rows, strict=False):
        timed = [(n, r) for n, r in row["results"].items() if "seconds" in r]
        timed.sort(key=lambda item: -item[1]["seconds"]["median"])
        medians = [r["seconds"]["median"] * 1e3 for _, r in timed]
        low = [m - r["seconds"]["p20"] * 1e3 for m, (_, r) in zip(medians, timed, strict=True)]
        high = [r["seconds"]["p80"] * 1e3 - m for m, (_, r) in zip(medians, timed, strict=True)]
        colours = [_colour(n, r) for n, r in timed]
        axis.barh([n for n, _ in timed], medians, xerr=[low, high], color=colours, ecolor="#555")
        axis.set_title(f"{row['title']}, {row['precision']}", fontsize=10)
        axis.set_xlabel("ms (bar: p20 to p80)", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in list(axes.flat)[len(rows) :]:
        axis.axis("off")
    return figure


def _memory(rows: list[dict[str, Any]]) -> Any:
    """Bytes per work and peer: resident before the step, and added by the step at its peak."""
    bars = [
        (f"{row['title']}, {row['precision']}: {name}", result["memory"], _colour(name, result))
        for row in reversed(rows)
        for name, result in row["results"].items()
        if "memory" in result
    ]
    figure, axis = plt.subplots(figsize=(10, 0.8 + 0.32 * len(bars)))
    labels = [label for label, _, _ in bars]
    before = [m["before"] / 1e9 for _, m, _ in bars]
    added = [(m["peak"] - m["before"]) / 1e9 for _, m, _ in bars]
    axis.barh(labels, before, color="#d9d2c5")
    axis.barh(labels, added, left=before, color=[colour for _, _, colour in bars])
    axis.set_xlabel("GB resident: before a step (pale), and what the step adds at its peak")
    axis.tick_params(labelsize=8)
    return figure
