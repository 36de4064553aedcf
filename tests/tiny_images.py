"""Pictures of coloured shapes with captions, and settings that pretrain on them within a few seconds."""

import json
import random

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}
SHAPES = ("square", "bar", "stripe", "cross")


def drawn(colour, shape, size=12):
    """The pixels (size, size, 3) of a shape on white."""
    pixels = np.full((size, size, 3), 255, np.uint8)
    a, b = size // 4, 3 * size // 4
    parts = {
        "square": [(slice(a, b), slice(a, b))],
        "bar": [(slice(0, size), slice(a, a + 3))],
        "stripe": [(slice(a, a + 3), slice(0, size))],
        "cross": [(slice(0, size), slice(a, a + 3)), (slice(a, a + 3), slice(0, size))],
    }
    for part in parts[shape]:
        pixels[part] = COLOURS[colour]
    return pixels


def write_folder(folder, copies=3, size=12):
    """Every colour and shape some times, of slightly different sizes, with two captions each."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, lines = random.Random(0), []
    for colour in COLOURS:
        for shape in SHAPES:
            for i in range(copies):
                name = f"{colour}-{shape}-{i}.png"
                Image.fromarray(drawn(colour, shape, size + i)).save(folder / name)
                words = [f"a {colour} {shape}", f"{draw.choice(('one', 'this'))} {shape}, {colour}"]
                lines += [{"file": name, "caption": text} for text in words]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "captions.jsonl").write_text(text)
    return folder


def tiny_settings(folder, recipe="two-towers", **settings):
    """Keyword arguments of PretrainConfig, with `settings` in the place of the defaults."""
    given = {
        "images": str(folder),
        "recipe": recipe,
        "heldout": 0.2,
        "vocab_size": 100,
        "layers": 1,
        "hidden": 32,
        "heads": 2,
        "max_length": 16,
        "max_position": 16,
        "patch": 4,
        "max_patches": 4,
        "batch_size": 12,
        "steps": 6,
        "lr": 3e-3,
        "threads": 1,
        "backend": "torch",
        "log_every": 1,
        "eval_every": 3,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return given | settings
