"""Images to patches: every byte at its place, padding and transparency white, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from fastbert.data.images import (
    image_batch,
    moved,
    read_image,
    stretched,
    tinted,
    to_patches,
    to_pixels,
)
from fastbert.files import images_in


def random_pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 5), (1, 1), (4, 31)])
def test_patches_hold_the_pixels_and_white(height, width):
    pixels = random_pixels(height, width)
    patches, places = to_patches(pixels, 4)
    rows, columns = -(-height // 4), -(-width // 4)
    assert patches.shape == (rows * columns, 48)
    for patch, (row, column) in zip(patches, places, strict=True):
        expected = np.full((4, 4, 3), 255, np.uint8)
        part = pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        expected[: part.shape[0], : part.shape[1]] = part
        assert np.array_equal(patch.reshape(4, 4, 3), expected)
    assert places.tolist() == [[i, j] for i in range(rows) for j in range(columns)]
    assert np.array_equal(to_pixels(patches, places)[:height, :width], pixels)


def test_a_batch_lies_end_to_end():
    images = [random_pixels(8, 4), random_pixels(3, 3), random_pixels(12, 8)]
    batch = image_batch(images, 4)
    assert batch["patch_cu_seqlens"].tolist() == [0, 2, 3, 9]
    assert batch["patch_max_seqlen"] == 6
    assert np.array_equal(batch["patches"][3:].numpy(), to_patches(images[2], 4)[0])


@pytest.mark.parametrize(("down", "right"), [(2, 0), (-2, 3), (0, -1), (9, 1), (0, 0)])
def test_moved(down, right):
    pixels = random_pixels(6, 7)
    wide = np.full((26, 27, 3), 255, np.uint8)
    wide[10 + down : 16 + down, 10 + right : 17 + right] = pixels
    assert np.array_equal(moved(pixels, down, right), wide[10:16, 10:17])


def test_stretched_and_turned():
    pixels = np.full((11, 15, 3), 255, np.uint8)
    pixels[3:8, 5:10] = 0
    assert np.array_equal(stretched(pixels, 1.0, 1.0), pixels)
    # a square of 5 pixels around the middle becomes 10 wide, and 2.5 high
    found = (255.0 - stretched(pixels, 0.5, 2.0))[..., 0] / 255
    assert found.sum(1).max() == pytest.approx(10, abs=0.6)
    assert found.sum(0).max() == pytest.approx(2.5, abs=0.6)
    assert np.abs(found - found[::-1, ::-1]).max() < 0.02
    # a bar that lies stands after a quarter of a turn
    bar = np.full((15, 15, 3), 255, np.uint8)
    bar[7, 2:13] = 0
    bar[7, 12] = (255, 0, 0)
    turned = stretched(bar, 1.0, 1.0, 90)
    assert np.abs(turned.astype(int) - np.rot90(bar, -1)).max() < 3


def test_tinted_keeps_white():
    pixels = np.full((2, 2, 3), 255, np.uint8)
    pixels[0] = (205, 55, 255)
    found = tinted(pixels, np.array([2.0, 2.0, 0.5]))
    assert found[0, 0].tolist() == [155, 0, 255]
    assert (found[1] == 255).all()


def test_patches_are_chosen():
    images = [random_pixels(8, 8), random_pixels(8, 4, seed=1)]
    batch = image_batch(images, 4, lambda i, count: np.arange(i, count))
    assert batch["patch_cu_seqlens"].tolist() == [0, 4, 5]
    assert batch["places"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 0]]
    assert np.array_equal(batch["patches"][4:].numpy(), to_patches(images[1], 4)[0][1:])


def saved(path, mode, size=(5, 6)):
    image = Image.fromarray(random_pixels(*size)).convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(30, dtype=np.uint8).reshape(size) * 8))
    image.convert(mode).save(path)
    return path


def test_transparency_lies_on_white(tmp_path):
    path = saved(tmp_path / "a.png", "RGBA")
    rgba = np.asarray(Image.open(path)).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(read_image(path, 4, 2) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGB", "CMYK"])
def test_modes_become_three_bytes(tmp_path, mode):
    path = saved(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), mode)
    pixels = read_image(path, 4, 2)
    assert pixels.shape == (5, 6, 3)
    assert pixels.dtype == np.uint8
    if mode == "RGB":
        assert np.array_equal(pixels, random_pixels(5, 6))


def test_an_image_stands_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(random_pixels(5, 6)).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png", 4, 2).shape == (6, 5, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", r"a.png can't be read as an image: "),
        ("a.png", b"no image at all", r"a.png can't be read as an image: "),
        ("cut.png", None, r"cut.png can't be read as an image: "),
        ("b.png", "I;16", "its pixels are I;16, and not of 8 bits: convert it"),
        ("large.png", "L", r"large.png is 6 x 5 pixels and the model takes 1 patches of 4 pixels"),
    ],
)
def test_refusals(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        data = saved(path, "RGB").read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
    elif content == "I;16":
        Image.fromarray(np.zeros((5, 6), np.uint16)).save(path)
    else:
        saved(path, content)
    with pytest.raises(ValueError, match=message) as error:
        read_image(path, 4, 1 if name == "large.png" else 2)
    assert "\n" not in str(error.value)


def test_files_and_folders_of_images(tmp_path):
    for name in ("b.PNG", "a.png", "deep/c.jpg", "notes.txt"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"")
    found = images_in([tmp_path / "x" / "deep" / "c.jpg", tmp_path / "x"])
    assert [p.name for p in found] == ["c.jpg", "a.png", "b.PNG", "c.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no image that ends in \.png"):
        images_in([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="does not exist: name an image file"):
        images_in([tmp_path / "z.png"])
