"""The benchmark on emoji: its split, its captions, its table, and a run on invented drawings."""

import json
import random
import sys

import pytest
import tiny_images
from PIL import Image

from benchmarks.models import emoji


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages of 16 emoji of one colour and shape each, two vendors' drawings, the last without annotation."""
    rows, annotations = [], {}
    places = {f"emoji-{v}": tmp_path / v for v in emoji.VENDORS} | {"emoji-names": tmp_path / "n"}
    kinds = [(c, s) for c in tiny_images.COLOURS for s in tiny_images.SHAPES]
    for i, (colour, shape) in enumerate(kinds):
        rows.append({"name": f"{colour} {shape}".upper(), "unified": f"{0x1F600 + i:X}-FE0F"})
        rows[-1] |= {f"has_img_{v}": True for v in emoji.VENDORS} | {"image": f"{i}.png"}
        if i < 15:
            words = {"tts": [f"{colour} {shape}"], "default": [colour, shape, f"{colour} {shape}"]}
            annotations[chr(0x1F600 + i)] = words
        for size, vendor in ((60, "google"), (64, "twitter")):
            folder = places[f"emoji-{vendor}"] / "img" / vendor / "64"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(tiny_images.drawn(colour, shape, size)).save(folder / f"{i}.png")
    rows.append({**rows[0], "unified": "1F700", "has_img_google": False})
    (places["emoji-google"] / "emoji.json").write_text(json.dumps(rows))
    places["emoji-names"].mkdir()
    text = json.dumps({"annotations": {"annotations": annotations}})
    (places["emoji-names"] / "annotations.json").write_text(text)
    monkeypatch.setattr(emoji, "fetch", places.__getitem__)


def test_concepts_and_their_split(packages):
    found = emoji.concepts()
    assert len(found) == 16
    assert found[0] == emoji.Concept("0.png", "1F600-FE0F", "red square", ("red", "square"))
    assert found[15].text == "black cross"
    train, held = emoji.split(found)
    assert (len(train), len(held)) == (13, 3)
    # whatever the order
    assert emoji.split(found[::-1]) == (train, held)
    captions = found[0].captions(random.Random(0))
    assert len(captions) == 5
    assert all(text.startswith("red square") for text in captions)


def test_a_run_on_invented_drawings(packages, tmp_path, monkeypatch, capsys):
    small = ["hidden=16", "heads=2", "image_layers=1", "batch_size=8", "backend=torch"]
    out = tmp_path / "emoji.json"
    words = [
        "--set",
        *small,
        "vocab_size=100",
        "--steps",
        3,
        "--threads",
        1,
        "--limit",
        8,
        "--runs",
        tmp_path / "runs",
        "--out",
        out,
    ]
    monkeypatch.setattr(sys, "argv", ["emoji", *map(str, words), "--works", "concepts", "style"])
    assert emoji.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows["concepts"]["concepts"] == 3
    assert rows["style"]["chance"]["r1"] == pytest.approx(1 / 8)
    assert rows["style"]["steps"] == 3
    assert set(rows["style"]) >= {"twitter to text", "twitter to google", "twitter to both"}
    shown = capsys.readouterr().out
    assert "| concepts: text to google |" in shown
    assert "| style: chance, of 8 | 12.5% | 62.5% | 100.0% | |" in shown
    # a finished run is judged again without training
    before = (tmp_path / "runs" / "style" / "metrics.jsonl").read_text()
    assert emoji.main() == 0
    assert (tmp_path / "runs" / "style" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(("r10", "size", "met"), [(0.31, 1.9e9, "met"), (0.2, 2.1e9, "**missed**")])
def test_the_table_shows_goals(r10, size, met):
    values = {"r1": 0.61 if met == "met" else 0.5, "r5": 0.2, "r10": r10}
    common = {"date": "today", "steps": 5, "minutes": 2.0, "chance": values, "concepts": 1911}
    ways = ("text to google", "text to twitter", "google to text", "twitter to text")
    steps = [{"pairs": 64, "chunk": 0, "bytes": 3e9}, {"pairs": 1024, "chunk": 16, "bytes": size}]
    rows = {
        "concepts": common | dict.fromkeys(ways, values),
        "style": common | {"twitter to google": values},
        "memory": {"date": "today", "steps": steps},
    }
    machine = {"cpu": "a", "instructions": "b", "threads": 2}
    machine["versions"] = {"fastbert": "0", "torch": "1"}
    text = emoji.table({"rows": rows, "machine": machine})
    assert f"| {values['r1']:.1%} | 20.0% | {r10:.1%} | mean R@10 30%: {met} |" in text
    assert f"R@1 60%: {met} |" in text
    assert f"| 1,024 | 16 | {size / 1e9:.2f} | 2: {met} |" in text
    assert "| 64 | all | 3.00 |  |" in text


@pytest.mark.slow
def test_a_step_in_chunks_takes_less_memory():
    whole, chunks = (emoji.peak(64, chunk) for chunk in (0, 8))
    assert whole["parameters"] == chunks["parameters"] > 40
    added = [found["bytes"] - found["before"] for found in (whole, chunks)]
    # weights' gradients and moments are in both
    assert added[1] < 0.6 * added[0]
