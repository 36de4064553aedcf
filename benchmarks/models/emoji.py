"""Two towers from scratch on emoji: `python -m benchmarks.models.emoji [--works concepts style memory] [--minutes 28]`.

Google's and Twitter's drawings, 64 x 64 pixels of 1,911 emoji (npm emoji-datasource-google and -twitter 16), with
English names and keywords (npm cldr-annotations-full 48). A caption is the name with some of the keywords at random.

concepts: both drawings of four fifths of the emoji are trained on. Of the others, the fifth whose code points have the
least SHA-256, a text of name and keywords ranks one vendor's drawings. style: all of Google's drawings are trained on,
and each of Twitter's ranks all concepts, by their texts and by Google's drawings. Skin tones and other variants of an
emoji are no concepts. memory: the peak memory of a training step of 1,024 pairs in chunks.

Every run goes on where an earlier command has stopped, and its row is kept in the JSON of the results at once.
docs/images.md has the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS, ROOT
from benchmarks.models.int8_accuracy import verdict
from benchmarks.models.summary import by_work
from benchmarks.report.readme import filled, replaced
from fastbert.bert import BertConfig
from fastbert.data.fetch import fetch
from fastbert.files import json_lines, parse_json, read_text, write_text
from fastbert.infer import ImageTextEmbedder
from fastbert.models.images import with_patches
from fastbert.models.two_towers import ImageTextConfig, TwoTowers
from fastbert.pretrain import PretrainConfig, pretrain
from fastbert.pretrain.retrieval import recalls

JSON = RESULTS / "emoji.json"
PAGE = ROOT / "docs" / "images.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.emoji -->", "<!-- end of table -->"
WORKS = ("concepts", "style", "memory")
VENDORS = ("google", "twitter")
# goals: texts of concepts never seen find their drawing among the best ten; drawings of a style never seen find their
# concept first; bytes of a step
CONCEPTS, STYLE, MEMORY = 0.30, 0.60, 2e9
# captions that are drawn for every image
CAPTIONS = 16
SETTINGS: dict[str, Any] = {
    "recipe": "two-towers",
    "layers": 1,
    "image_layers": 4,
    "hidden": 128,
    "heads": 4,
    "patch": 8,
    "max_patches": 8,
    "vocab_size": 2000,
    "max_length": 32,
    "max_position": 32,
    "batch_size": 128,
    "optimiser": "muon",
    "lr": 3e-3,
    "initializer_range": 0.05,
    "weight_decay": 0.1,
    "shift": 5,
    "zoom": 0.25,
    "turn": 12.0,
    "tint": 0.4,
    "drop_patches": 0.5,
    "eval_every": 0,
    "checkpoint_every": 200,
    "keep_last": 1,
}
# (pairs, how many of them are encoded at once, 0 for all) of each training step whose memory is measured
STEPS = ((64, 0), (128, 0), (128, 16), (1024, 16))


@dataclass(frozen=True)
class Concept:
    """An emoji: the name of its image file, its code points, its name and its keywords."""

    image: str
    points: str
    name: str
    keywords: tuple[str, ...]

    @property
    def text(self) -> str:
        """Name and keywords, the text by which drawings of the emoji are looked up."""
        return ", ".join((self.name, *self.keywords))

    def captions(self, draw: random.Random) -> list[str]:
        """Captions to train on: the name with random keywords in random order."""
        found = []
        for _ in range(CAPTIONS):
            some = draw.sample(self.keywords, draw.randint(0, len(self.keywords)))
            found.append(", ".join((self.name, *some)))
        return sorted(set(found))


def concepts() -> list[Concept]:
    """All emoji that both vendors draw; the name is emoji.json's where the annotations lack the emoji."""
    emoji = parse_json(read_text(fetch("emoji-google") / "emoji.json"))
    names = parse_json(read_text(fetch("emoji-names") / "annotations.json"))
    annotations = names["annotations"]["annotations"]
    found = []
    for one in emoji:
        if not all(one[f"has_img_{vendor}"] for vendor in VENDORS):
            continue
        text = "".join(chr(int(point, 16)) for point in one["unified"].split("-"))
        known = annotations.get(text) or annotations.get(text.replace("\ufe0f", "")) or {}
        name = known.get("tts", [one["name"].lower()])[0]
        words = tuple(word for word in known.get("default", ()) if word != name)
        found.append(Concept(one["image"], one["unified"], name, words))
    return found


def split(all_of_them: list[Concept]) -> tuple[list[Concept], list[Concept]]:
    """The concepts for training, and the fifth that is held out: those with the least hashes of their code points."""

    def order(one: Concept) -> str:
        return hashlib.sha256(one.points.encode()).hexdigest()

    ranked = sorted(all_of_them, key=order)
    count = len(ranked) // 5
    return ranked[count:], ranked[:count]


def image_of(vendor: str, one: Concept) -> Path:
    """The drawing of a vendor, 64 x 64 pixels."""
    return fetch(f"emoji-{vendor}") / "img" / vendor / "64" / one.image


def write_folder(folder: Path, vendors: tuple[str, ...], some: list[Concept], train: bool) -> Path:
    """A folder of images with captions, as fastbert pretrain reads it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for vendor in vendors:
        for one in some:
            file = f"{vendor}-{one.image}"
            shutil.copyfile(image_of(vendor, one), folder / file)
            draw = random.Random(file)
            texts = one.captions(draw) if train else [one.text]
            lines += [{"file": file, "caption": text} for text in texts]
    write_text(folder / "captions.jsonl", json_lines(lines))
    return folder


def trained(work: str, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Train, or go on, and return the folder of the model and the figures of its run."""
    out, everything = options.runs / work, concepts()
    if not (out / "config.toml").is_file():
        train, held = split(everything) if work == "concepts" else (everything, everything)
        vendors = VENDORS if work == "concepts" else VENDORS[:1]
        data = options.runs / f"{work}-data"
        folders = (
            write_folder(data / "train", vendors, train[: options.limit], True),
            write_folder(data / "held", VENDORS[1:], held[: options.limit], False),
        )
        # the length of a run: steps where they are given, else minutes
        length = {"steps": options.steps} if options.steps else {"minutes": options.minutes}
        config = PretrainConfig(
            **{**SETTINGS, **length, "threads": options.threads, **options.set},
            images=str(folders[0]),
            eval_images=str(folders[1]),
        )
        result = pretrain(config, out, say=print)
    else:
        result = pretrain(None, out, resume=True, say=print)
    return result.model, {"steps": result.steps, "minutes": result.seconds / 60}


def ranked(queries: Tensor, keys: Tensor) -> dict[str, float]:
    """Recalls where query i wants key i."""
    return recalls(queries @ keys.T, torch.arange(len(queries)))


def measured(work: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the results."""
    if work == "memory":
        return {"steps": [peak(*step) for step in options.memory]}
    folder, row = trained(work, options)
    embedder = ImageTextEmbedder(folder)
    everything = concepts()
    asked = (split(everything)[1] if work == "concepts" else everything)[: options.limit]
    texts = embedder.texts([one.text for one in asked])
    images = {v: embedder.images([image_of(v, one) for one in asked], 256) for v in VENDORS}
    row["concepts"] = len(asked)
    row["chance"] = {f"r{k}": min(k / len(asked), 1.0) for k in (1, 5, 10)}
    if work == "concepts":
        row |= {f"text to {v}": ranked(texts, images[v]) for v in VENDORS}
        row |= {f"{v} to text": ranked(images[v], texts) for v in VENDORS}
    else:
        new = images["twitter"]
        row["twitter to text"] = ranked(new, texts)
        row["twitter to google"] = ranked(new, images["google"])
        row["twitter to both"] = ranked(new, texts + images["google"])
    print(work, json.dumps(row, indent=1), flush=True)
    return row


def given(word: str) -> tuple[str, Any]:
    """A setting's name and value, of name=value."""
    name, _, value = word.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# --- memory ---


def peak(pairs: int, chunk: int) -> dict[str, Any]:
    """The peak memory of a process that makes one training step."""
    command = [sys.executable, "-m", "benchmarks.models.emoji", "--step", str(pairs), str(chunk)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    print("memory", json.dumps(found), flush=True)
    return found


def one_step(pairs: int, chunk: int) -> dict[str, Any]:
    """A step with AdamW of a ViT-S on images of 128 x 128 pixels, patches of 16, beside texts of 32 tokens."""
    torch.manual_seed(0)
    width: dict[str, Any] = {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "pre_norm": True,
        "type_vocab_size": 0,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    text = BertConfig(num_hidden_layers=6, vocab_size=30522, max_position_embeddings=64, **width)
    image = BertConfig(num_hidden_layers=12, vocab_size=1, max_position_embeddings=1, **width)
    model = TwoTowers(ImageTextConfig(text, with_patches(image, 16, 8))).train()
    model.chunk = chunk
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    bounds = torch.arange(pairs + 1, dtype=torch.int32)
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).repeat(pairs, 1)
    batch = {
        "input_ids": torch.randint(1, 30522, (32 * pairs,)),
        "cu_seqlens": 32 * bounds,
        "max_seqlen": 32,
        "patches": torch.randint(0, 256, (64 * pairs, 768), dtype=torch.uint8),
        "places": places,
        "patch_cu_seqlens": 64 * bounds,
        "patch_max_seqlen": 64,
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(**batch).loss.backward()
    optimiser.step()
    # Linux counts in KB
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    sizes = {"pairs": pairs, "chunk": chunk, "parameters": millions}
    return {**sizes, "bytes": 1024 * after, "before": 1024 * before}


# --- the page ---


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = results["rows"]
    lines = [
        "| emoji, two towers from scratch | R@1 | R@5 | R@10 | goal |",
        "|---|---|---|---|---|",
    ]
    trainings = {w: rows[w] for w in ("concepts", "style") if w in rows}
    for work, row in trainings.items():
        named = {name: value for name, value in row.items() if " to " in name}
        for name, found in named.items():
            cells = " | ".join(f"{found[f'r{k}']:.1%}" for k in (1, 5, 10))
            lines.append(f"| {work}: {name} | {cells} | {_goal(work, name, row)} |")
        cells = " | ".join(f"{row['chance'][f'r{k}']:.1%}" for k in (1, 5, 10))
        lines.append(f"| {work}: chance, of {row['concepts']:,} | {cells} | |")
    if "memory" in rows:
        lines += ["", "| pairs | encoded at once | peak memory of the process, GB | goal |"]
        lines.append("|---|---|---|---|")
        for step in rows["memory"]["steps"]:
            goal = ""
            if step["pairs"] == STEPS[-1][0]:
                goal = f"{MEMORY / 1e9:g}: {verdict(step['bytes'] <= MEMORY)}"
            lines.append(
                f"| {step['pairs']:,} | {step['chunk'] or 'all'} | {step['bytes'] / 1e9:.2f} | {goal} |"
            )
    m, v = results["machine"], results["machine"]["versions"]
    lengths = ", ".join(
        f"{w} {row['steps']:,} steps in {row['minutes']:.1f} minutes"
        for w, row in trainings.items()
    )
    footnote = (
        f"{' and '.join(sorted({row['date'] for row in rows.values()}))}, {m['cpu']} ({m['instructions']}), threads: "
        f"{m['threads']}, fastbert {v['fastbert']}, torch {v['torch']}. Training: {lengths or 'none'}."
    )
    return "\n".join([*lines, "", filled(footnote)])


def _goal(work: str, name: str, row: dict[str, Any]) -> str:
    if work == "concepts" and name.startswith("text to"):
        mean = sum(row[f"text to {v}"]["r10"] for v in VENDORS) / len(VENDORS)
        return f"mean R@10 {CONCEPTS:.0%}: {verdict(mean >= CONCEPTS)}"
    if name == "twitter to google":
        return f"R@1 {STYLE:.0%}: {verdict(row[name]['r1'] >= STYLE)}"
    return ""


def main() -> int:
    """Measure, print, and write the JSON; the page only where the JSON is the repository's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--minutes", type=float, default=28.0, help="of each training")
    parser.add_argument("--steps", type=int, help="of each training, instead of minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, help="emoji of each part, to try the command")
    parser.add_argument("--set", nargs="+", default=[], help="other settings, such as hidden=192")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "emoji")
    parser.add_argument("--step", nargs=2, type=int, help="pairs and chunk of one measured step")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON that rows are merged into")
    options = parser.parse_args()
    options.set = dict(given(word) for word in options.set)
    options.memory = ((4, 0), (8, 2)) if options.limit else STEPS
    if options.step:
        print(json.dumps(one_step(*options.step)))
        return 0
    results = by_work(options.works, options.out, lambda name: measured(name, options))
    print(table(results))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(results), BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
