"""Pictures of a fine-tuning run: its learning curves and its confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbert.train.metrics import read_metrics
from fastbert.train.plot import curve, figure, save


def plot_curves(metrics: Path, image: Path, metric: str, best: int, title: str) -> None:
    """Draw training and validation loss and the metric beside them from a metrics.jsonl; a line at the best step."""
    lines = read_metrics(metrics)
    picture = figure()
    axes = picture.add_subplot(title=title, xlabel="step", ylabel="loss, nats")
    curve(axes, lines, "train", "loss", label="training loss", alpha=0.7)
    curve(axes, lines, "eval", "loss", label="validation loss", marker="o")
    axes.grid(alpha=0.3)
    if metric != "loss":
        right = axes.twinx()
        right.set_ylabel(metric)
        curve(right, lines, "eval", metric, label=f"validation {metric}", marker="s", color="C2")
        right.legend(loc="center right")
    axes.axvline(best, color="C3", linestyle="--", label=f"best, step {best}")
    axes.legend(loc="upper right")
    save(picture, image)


def plot_confusion(
    image: Path, names: Sequence[str], matrix: NDArray[np.int64], title: str
) -> None:
    """Draw counts (true, predicted), shaded by their share of each true class; the figures too for up to 30 classes."""
    n = len(names)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(3.0 + 0.5 * n, 20.0)
    picture = figure(side + 1.0, side)
    axes = picture.add_subplot(title=title, xlabel="predicted", ylabel="true")
    shades = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    picture.colorbar(shades, label="part of the true class")
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    for i, j in np.ndindex(n, n) if n <= 30 else ():
        colour = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color=colour, fontsize=8)
    save(picture, image)
