"""The loss curve of a run as a PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.files import write_bytes
from fastbert.train.metrics import read_metrics


def plot_losses(metrics: Path, image: Path, baselines: Mapping[str, float], title: str) -> None:
    """Draw training loss, held-out loss, and baselines as horizontal lines, from a metrics.jsonl."""
    lines = read_metrics(metrics)
    picture = figure()
    axes = picture.add_subplot(title=title, xlabel="step", ylabel="nats per predicted token")
    curve(axes, lines, "train", "mlm_loss", label="training, all labelled tokens", alpha=0.7)
    curve(axes, lines, "eval", "mlm_loss_masked", label="held out, where [MASK]", marker="o")
    curve(axes, lines, "train", "lm_loss", label="training, next words", alpha=0.7)
    curve(axes, lines, "eval", "lm_loss", label="held out, next words", marker="o")
    for i, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, color=f"C{i + 2}", linestyle="--", label=f"{name}: {value:.3f}")
    axes.grid(alpha=0.3)
    axes.legend()
    save(picture, image)


def plot_recalls(metrics: Path, image: Path, baselines: Mapping[str, float], title: str) -> None:
    """Draw the losses of a run on images, and beside them its recalls and those of chance, from a metrics.jsonl."""
    lines = read_metrics(metrics)
    picture = figure(12)
    losses, recalls = picture.subplots(1, 2)
    losses.set(title=title, xlabel="step", ylabel="nats")
    for name in ("contrastive_loss", "mlm_loss", "matching_loss"):
        curve(losses, lines, "train", name, label=f"training, {name}", alpha=0.7)
    for name in ("contrastive_loss", "mlm_loss_masked"):
        curve(losses, lines, "eval", name, label=f"held out, {name}", marker="o")
    recalls.set(title="held out", xlabel="step", ylabel="recall", ylim=(0, 1))
    for way in ("text_to_image", "image_to_text"):
        for rank in ("r1", "r10"):
            curve(recalls, lines, "eval", f"{way}_{rank}", label=f"{way} {rank}", marker="o")
    for i, (name, value) in enumerate(baselines.items()):
        recalls.axhline(value, color=f"C{i + 4}", linestyle="--", label=f"{name}: {value:.3f}")
    for axes in (losses, recalls):
        axes.grid(alpha=0.3)
        axes.legend()
    save(picture, image)


def figure(width: float = 8, height: float = 5) -> Any:
    """An empty figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(figure: Any, image: Path) -> None:
    """Write a figure as a PNG, all of it or nothing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(image, buffer.getvalue())


def curve(axes: Any, lines: list[dict[str, Any]], kind: str, name: str, **style: Any) -> None:
    """Draw one value of a metrics.jsonl's train or eval lines over the steps."""
    points = [(line["step"], line[name]) for line in lines if line["kind"] == kind and name in line]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
