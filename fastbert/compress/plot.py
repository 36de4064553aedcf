"""A picture of what pruning kept of every layer."""

from __future__ import annotations

from pathlib import Path

from fastbert.compress.prune import Pruned
from fastbert.train.plot import figure, save


def plot_kept(found: Pruned, image: Path) -> None:
    """Draw the heads and the feed-forward width of every layer as bars, in front of the dense model's."""
    picture = figure(9, 4)
    picture.suptitle(f"kept at {found.measured:.2f} times the dense model's speed")
    layers = range(len(found.heads))
    parts = ((found.heads, found.dense_heads), (found.widths, found.dense_width))
    for i, (kept, dense) in enumerate(parts):
        axes = picture.add_subplot(1, 2, i + 1, xlabel="layer", ylabel=("heads", "width")[i])
        axes.bar(layers, [dense] * len(kept), color="0.88", label="dense")
        axes.bar(layers, kept, color="C0", label="kept")
        axes.set_xticks(layers)
    picture.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    save(picture, image)
