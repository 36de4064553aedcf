"""Images of any size as packed rows of patches: files read by pillow, transparency on white, sides padded by white.

An image is never resized. A side that is no multiple of the patch is padded at its right or lower end, by less than a
patch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbert.files import IMAGES, existing

U8 = NDArray[np.uint8]
# of transparent places, of padding, and behind an image that is moved
BACKGROUND = 255


def read_image(path: str | Path, patch_size: int, sides: int) -> U8:
    """The pixels (height, width, 3) of an image, turned as its EXIF data says; of an animation the first picture.

    Raises FileNotFoundError, or ValueError naming the file, for one that does not decode, or that has more than `sides`
    rows or columns of patches.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    existing(path, IMAGES)
    try:
        with warnings.catch_warnings():
            # the size is checked before pixels are decoded
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(path, image.size, patch_size, sides)
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"its pixels are {image.mode}, and not of 8 bits: convert it")
                return _on_white(ImageOps.exif_transpose(image))
    except TooLarge:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} can't be read as an image: its format is not known") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} can't be read as an image: {reason}") from error


class TooLarge(ValueError):
    """An image has more patches in a row or column than the model has positions."""


def _check_size(path: Any, size: tuple[int, int], patch_size: int, sides: int) -> None:
    most = max(size)
    if -(-most // patch_size) > sides:
        raise TooLarge(
            f"{path} is {size[0]} x {size[1]} pixels and the model takes {sides} patches of {patch_size} pixels a "
            f"side, {sides * patch_size}: scale it down, or train with more"
        )


def _on_white(image: Any) -> U8:
    from PIL import Image

    if image.mode == "P" or "transparency" in image.info or image.mode in ("LA", "PA", "RGBa"):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        below = Image.new("RGBA", image.size, (BACKGROUND,) * 4)
        below.alpha_composite(image)
        image = below
    return np.asarray(image.convert("RGB"))


def to_patches(pixels: U8, patch_size: int) -> tuple[U8, NDArray[np.int64]]:
    """The patches (P, 3 p p) of an image (height, width, 3), row by row, and their places (P, 2): row and column."""
    p = patch_size
    rows, columns = (-(-n // p) for n in pixels.shape[:2])
    whole = np.full((rows * p, columns * p, 3), BACKGROUND, np.uint8)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    patches = whole.reshape(rows, p, columns, p, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    places = np.stack(np.divmod(np.arange(rows * columns), columns), 1)
    return patches, places


def to_pixels(patches: U8, places: NDArray[np.int64]) -> U8:
    """The image (height, width, 3) of patches; its sides are multiples of the patch."""
    p = round((patches.shape[1] / 3) ** 0.5)
    rows, columns = (places.max(0) + 1).tolist()
    return patches.reshape(rows, columns, p, p, 3).swapaxes(1, 2).reshape(rows * p, columns * p, 3)


def moved(pixels: U8, down: int, right: int) -> U8:
    """The image, of the same size, moved by some pixels; white comes in at the sides."""
    height, width = pixels.shape[:2]
    found = np.full_like(pixels, BACKGROUND)
    down, right = max(-height, min(down, height)), max(-width, min(right, width))
    source = pixels[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
    top, left = max(down, 0), max(right, 0)
    found[top : top + source.shape[0], left : left + source.shape[1]] = source
    return found


def stretched(pixels: U8, down: float, across: float, degrees: float = 0.0) -> U8:
    """The image, of the same size, with height and width times a factor, turned around its middle; white comes in."""
    from PIL import Image

    height, width = pixels.shape[:2]
    angle = math.radians(degrees)
    sine, cosine = math.sin(angle), math.cos(angle)
    # the place in the image that is shown at a place of the result, from the middle
    a, b, d, e = cosine / across, sine / across, -sine / down, cosine / down
    x, y = width / 2, height / 2
    matrix = (a, b, x - a * x - b * y, d, e, y - d * x - e * y)
    found = Image.fromarray(pixels).transform(
        (width, height),
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BILINEAR,
        fillcolor=(BACKGROUND,) * 3,
    )
    return np.asarray(found)


def tinted(pixels: U8, factors: NDArray[np.float64]) -> U8:
    """The image with the distance of each colour (3,) from white multiplied by a factor."""
    away = (BACKGROUND - pixels.astype(np.float32)) * factors.astype(np.float32)
    return (BACKGROUND - np.minimum(away, BACKGROUND)).astype(np.uint8)


def image_batch(
    images: Sequence[U8],
    patch_size: int,
    choose: Callable[[int, int], NDArray[np.int64]] | None = None,
) -> dict[str, Any]:
    """Images, laid end to end, as the keyword arguments of an image encoder.

    patches (P, 3 p p) uint8, places (P, 2) int64, patch_cu_seqlens (B + 1,) int32, patch_max_seqlen, an int.
    `choose` gives, of an image's number and of the number of its patches, the patches that are taken.
    """
    found = [to_patches(pixels, patch_size) for pixels in images]
    if choose is not None:
        chosen = [choose(i, len(patches)) for i, (patches, _) in enumerate(found)]
        found = [(p[c], at[c]) for (p, at), c in zip(found, chosen, strict=True)]
    lengths = np.array([len(patches) for patches, _ in found])
    return {
        "patches": torch.from_numpy(np.concatenate([patches for patches, _ in found])),
        "places": torch.from_numpy(np.concatenate([places for _, places in found])),
        "patch_cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        "patch_max_seqlen": int(lengths.max()),
    }
