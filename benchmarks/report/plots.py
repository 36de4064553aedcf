"""The plots beside the tables: inference, training and memory; compressed models; speed against metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.transforms import Bbox

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


def draw_compression(results: dict[str, Any], path: Path) -> Path:
    """Write a panel per work: the metric of every form and peer over its speed against the dense model."""
    rows = results["rows"]
    figure, axes = plt.subplots(len(rows), 1, figsize=(8.5, 5 * len(rows)), squeeze=False)
    names = []
    for axis, (work, row) in zip(axes.flat, rows.items(), strict=True):
        for form, f in row["forms"].items():
            if "speed" in f:
                x, low, high = (f["speed"][key] for key in ("median", "p20", "p80"))
                y, colour = 100 * f["value"], OTHERS if "peer" in f else OURS
                axis.errorbar(
                    x, y, xerr=[[x - low], [high - x]], fmt="o", color=colour, ecolor="#555"
                )
                names.append((axis, form, (x, high, y)))
        axis.set_title(f"{work}, {row['examples']:,} examples", fontsize=10)
        axis.set_xlabel("times as fast as the dense model in fp32 (line: p20 to p80)", fontsize=8)
        axis.set_ylabel(f"{row['metric']}, %", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.margins(y=0.12)
        # room for the names at the right
        left, right = axis.get_xlim()
        axis.set_xlim(left, right + 0.25 * (right - left))
    # the names are placed by their size in the final layout, and cover no point
    figure.tight_layout()
    points = [axis.transData.transform((speed, y)) for axis, _, (speed, _, y) in names]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for name in names:
        taken.append(_label(*name, taken))
    return _save(figure, path)


def _label(axis: Any, name: str, at: tuple[float, float, float], taken: list[Any]) -> Any:
    """Write a name at the right of a point and its band, else above or below with a line; returns the name's box."""
    x, high, y = at
    heights = (0, 12, -12, 24, -24, 36, -36)
    for height in heights:
        # text, or a line to the point: a box that holds both would be too large
        place = {"xy": (x if height else high, y), "xytext": (6, height)}
        place |= {"textcoords": "offset points", "va": "center"}
        note = axis.annotate(name, fontsize=8, **place)
        box = note.get_window_extent()
        if height == heights[-1] or not any(box.overlaps(other) for other in taken):
            break
        note.remove()
    if height:
        axis.annotate("", arrowprops={"arrowstyle": "-", "color": "#aaa"}, **place)
    return box


def draw_tradeoff(results: dict[str, Any], path: Path) -> Path:
    """Write a line per work: the metric of pruned models, in percent of the dense one's, over their speed."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    axis.axhline(100, color="#aaa", linewidth=0.8)
    for work, row in results["rows"].items():
        ordered = sorted(row["points"], key=lambda point: point["speed"]["median"])
        dense = row["points"][0]["value"] or 1.0
        speeds = [[point["speed"][key] for key in ("median", "p20", "p80")] for point in ordered]
        x = [median for median, _, _ in speeds]
        band = [[m - low for m, low, _ in speeds], [high - m for m, _, high in speeds]]
        y = [100 * point["value"] / dense for point in ordered]
        title = f"{work}, {row['metric']} of {row['examples']:,} examples"
        axis.errorbar(x, y, xerr=band, fmt="o-", ecolor="#555", label=title)
    axis.set_xlabel("times as fast as the dense model (line: p20 to p80)", fontsize=8)
    axis.set_ylabel("% of the dense model's metric, nothing retrained", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _save(figure, path)
