"""Which patches of an image a text looks at, by integrated gradients of their similarity (Sundararajan et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.data.images import BACKGROUND, U8, to_patches, to_pixels
from fastbert.files import shortened
from fastbert.interpret.attributions import completeness_error, on_the_line
from fastbert.interpret.question import still
from fastbert.models.two_towers import TwoTowers
from fastbert.train.plot import figure, save

# patches of one packed batch
_MOST_PATCHES = 16384


@dataclass(frozen=True)
class PatchScores:
    """An image with a score for each patch.

    `value` is the cosine of image and text. `error` is |sum of the scores - expected| / |expected|, where expected is
    the value less that of a white image.
    """

    pixels: U8  # (height, width, 3), whole patches
    scores: Tensor  # (rows, columns) fp32
    text: str
    value: float
    error: float


def explain_image(
    towers: TwoTowers,
    pixels: U8,  # (height, width, 3), as fastbert.data.images.read_image gives it
    vector: Tensor,  # (D,), the text's
    text: str = "",
    steps: int = 50,
) -> PatchScores:
    """How much each patch adds to the cosine of an image and a text.

    The gradients are integrated on the line from a white image, at the points of Gauss and Legendre; the points are
    images of packed batches.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: it must be at least 1")
    patches, places = to_patches(pixels, towers.image.patches.patch_size)
    at = torch.from_numpy(places).to(towers.device)
    shown = torch.from_numpy(patches).to(towers.device)
    white = torch.full_like(shown, BACKGROUND)
    points, weights = on_the_line(steps)
    points = points.float().to(towers.device)
    wanted = vector.to(towers.device).float()
    with still(towers):
        with torch.no_grad():
            x, start = towers.image.patches(shown, at), towers.image.patches(white, at)
            first, last = _cosines(towers, torch.stack([start, x]), wanted).tolist()
        total = torch.zeros_like(x)
        size = max(_MOST_PATCHES // len(x), 1)
        for some, w in zip(points.split(size), weights.split(size), strict=True):
            between = (start + some[:, None, None] * (x - start)).requires_grad_()
            (g,) = torch.autograd.grad(_cosines(towers, between, wanted).sum(), between)
            total += torch.einsum("n,npc->pc", w.to(g), g)
    scores = ((x - start) * total).sum(1)
    error = completeness_error(scores, last - first)
    rows, columns = (places.max(0) + 1).tolist()
    return PatchScores(
        to_pixels(patches, places), scores.view(rows, columns).cpu(), text, last, error
    )


def _cosines(towers: TwoTowers, x: Tensor, vector: Tensor) -> Tensor:
    """(N,) the cosines of N images of embedded patches (N, P, C) and a text."""
    count, patches = x.shape[:2]
    bounds = torch.arange(count + 1, dtype=torch.int32, device=x.device) * patches
    e = towers.image.encode(x.flatten(0, 1), bounds, patches)
    return tnf.normalize(towers.image_projection(e.packing.mean(e.x)).float()) @ vector


def write_patches_png(found: PatchScores, path: str | Path) -> None:
    """Write a picture: the image, and beside it the image under a colour for each patch, blue for and red against."""
    picture = figure(8, 4.4)
    plain, coloured = picture.subplots(1, 2)
    plain.imshow(found.pixels)
    title = shortened(found.text, 60).replace("$", r"\$")
    plain.set_title(f"{title}\ncosine {found.value:.3f}", fontsize=9)
    most = float(found.scores.abs().max()) or 1.0
    height, width = found.pixels.shape[:2]
    coloured.imshow(found.pixels.mean(2), cmap="gray", vmin=0, vmax=255, alpha=0.5)
    shades = coloured.imshow(
        found.scores.numpy(),
        cmap="RdBu",
        vmin=-most,
        vmax=most,
        alpha=0.6,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    coloured.set_title(f"what each patch adds, error {found.error:.1%}", fontsize=9)
    picture.colorbar(shades, ax=coloured, shrink=0.8)
    for axes in (plain, coloured):
        axes.set_axis_off()
    save(picture, Path(path))
