"""What explanations cost: `python -m benchmarks.models.explaining --help`.

integrated: seconds a text of integrated gradients beside captum's LayerIntegratedGradients on the stock model of
transformers, on movie sentences and the model of benchmarks.models.int8_accuracy, interleaved. maps: the peak of memory
of one layer's weights beside a plain forward's, each in a process of its own. docs/interpret.md has the tables.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import RESULTS, ROOT
from benchmarks.models.int8_accuracy import Finetuned, movie_model, verdict
from benchmarks.models.scaling import resident
from benchmarks.models.summary import by_work, percentiles, ratio
from benchmarks.report.readme import filled, replaced
from fastbert.bert import BertConfig, BertModel
from fastbert.files import write_text
from fastbert.finetune import Predictor
from fastbert.interpret import Attribution, Explainer, Question, attention_maps, explain
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import rotated

JSON = RESULTS / "explaining.json"
PAGE = ROOT / "docs" / "interpret.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.explaining -->", "<!-- end of table -->"
OURS, ALONE, PADDED = "fastbert", "captum, text by text", "captum, texts padded together"
STEPS = 50
# of captum's time against ours, and of the process's peak against a plain forward's
GOAL, MEMORY_GOAL = 3.0, 1.2
# (B, S) of the forward whose memory is measured, of BERT-base
SHAPES = ((8, 128), (8, 512))
LAYER = 5


# --- integrated gradients ---


class Captum:
    """captum's integrated gradients of the word embeddings, on transformers' own model."""

    def __init__(self, model: Path, group: int) -> None:
        try:
            from captum.attr import LayerIntegratedGradients
        except ImportError:
            raise ValueError(
                "captum is not installed: run make bench-explaining, or pip install --no-deps captum"
            ) from None
        import transformers

        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
        self.model.requires_grad_(False)
        self.group = group
        words = self.model.base_model.embeddings.word_embeddings
        # captum takes the gradient at the embeddings: something before them must record it
        words.weight.requires_grad_(True)
        self.tool = LayerIntegratedGradients(self._logits, words)

    def _logits(self, ids: Any, mask: Any, types: Any) -> Any:
        return self.model(ids, attention_mask=mask, token_type_ids=types).logits

    def scores(self, questions: list[Question], targets: list[int]) -> list[Any]:
        """Scores (S,) of each text, `group` texts padded to one length at a time."""
        found: list[Any] = []
        for i in range(0, len(questions), self.group):
            some = questions[i : i + self.group]
            lengths = [len(q.ids) for q in some]
            ids, start, mask, types = (
                torch.zeros(len(some), max(lengths), dtype=torch.int64) for _ in range(4)
            )
            for row, (q, n) in enumerate(zip(some, lengths, strict=True)):
                ids[row, :n], types[row, :n], mask[row, :n] = q.ids, q.types, 1
                start[row, :n] = torch.where(q.fixed, q.ids, q.mask_id)
            given = self.tool.attribute(
                ids,
                start,
                target=targets[i : i + self.group],
                additional_forward_args=(mask, types),
                n_steps=STEPS,
            )
            found += [s[:n] for s, n in zip(given.sum(-1).detach(), lengths, strict=True)]
        return found


def integrated(options: argparse.Namespace) -> dict[str, Any]:
    """A row: seconds of all texts, by ours and by captum in two ways, which must agree."""
    one = movie_model(options.runs)
    questions = texts(one, options.texts)
    targets = [int(q.model(**q.packed(q.ids[None])[0]).logits.argmax()) for q in questions]
    answers: list[Attribution] = []

    def ours() -> list[Any]:
        answers[:] = [explain(q, "integrated", steps=STEPS) for q in questions]
        return [a.scores for a in answers]

    alone, padded = Captum(one.model, 1), Captum(one.model, 8)
    calls: dict[str, Callable[[], list[Any]]] = {
        OURS: ours,
        ALONE: lambda: alone.scores(questions, targets),
        PADDED: lambda: padded.scores(questions, targets),
    }
    agree({name: call() for name, call in calls.items()})
    around = {"before": peaks()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(options.rounds):
        for name in rotated([*calls], number):
            begin = time.perf_counter()
            calls[name]()
            samples[name].append(time.perf_counter() - begin)
    around["after"] = peaks()
    lengths = [len(q.ids) for q in questions]
    return {
        "texts": len(questions),
        "tokens": [min(lengths), float(np.mean(lengths)), max(lengths)],
        "rounds": options.rounds,
        "peaks": around,
        "error": percentiles([a.error for a in answers])
        | {"most": max(a.error or 0 for a in answers)},
        "seconds": {name: percentiles(s) for name, s in samples.items()},
        "ratio": {name: ratio(samples[name], samples[OURS]) for name in (ALONE, PADDED)},
    }


def texts(one: Finetuned, count: int) -> list[Question]:
    """Questions for the logit of the predicted class of the first texts of the test set."""
    explainer = Explainer(one.model)
    examples = Predictor(one.model).labelled(one.test, "test")
    return [explainer.question(e.text) for _, e in zip(range(count), examples, strict=False)]


def agree(found: dict[str, list[Any]]) -> None:
    """Raise ValueError where captum's scores of a text differ from ours."""
    for name, scores in found.items():
        for number, (a, b) in enumerate(zip(scores, found[OURS], strict=True)):
            if float((a - b).norm()) > 1e-3 * float(b.norm()):
                raise ValueError(f"{name} disagrees with us on text {number}: not timed")


# --- memory of attention maps ---


def measure_memory(name: str, B: int, S: int) -> dict[str, int]:
    """The peak of resident memory and its rise above that before the call, in this fresh process."""
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()

    def call(B: int, S: int) -> None:
        given = {"input_ids": torch.randint(5, 30000, (B, S))}
        if name == "maps":
            attention_maps(model, given, layers=[LAYER])
        else:
            with torch.no_grad():
                model(**given)

    # the first call loads libraries, starts threads and packs weights before memory is counted
    call(1, 8)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call(B, S)
    peak = resident("VmHWM")
    return {"peak": peak, "added": peak - before}


def maps(options: argparse.Namespace) -> dict[str, Any]:
    """A row: the peaks at every shape."""
    found = []
    for B, S in SHAPES:
        of: dict[str, dict[str, int]] = {}
        for name in ("plain", "maps"):
            command = [sys.executable, "-m", "benchmarks.models.explaining"]
            command += ["--measure", name, str(B), str(S)]
            # memory that malloc keeps of the short call would hide some of the peak
            env = os.environ | {"FASTBERT_KEEP_MEMORY": "0"}
            run = subprocess.run(
                command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
            )
            peak, added = map(int, run.stdout.split())
            of[name] = {"peak": peak, "added": added}
        found.append({"B": B, "S": S, **of})
    return {"shapes": found}


# --- results ---


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines, rows = [], results["rows"]
    if "integrated" in rows:
        row = rows["integrated"]
        low, mean, high = row["tokens"]
        lines += [
            f"**Integrated gradients**, {STEPS} steps, {row['texts']} movie sentences of {low} to {high} tokens (mean "
            f"{mean:.0f}), MiniLM-L6, {row['date']}: completeness error {row['error']['median']:.1e}, at most "
            f"{row['error']['most']:.1e}; all agree within 1e-3.",
            "",
            f"| | times as fast, goal {GOAL:g} | |",
            "|---|---|---|",
        ]
        for name, r in row["ratio"].items():
            spread = f"{r['median']:.2f} ({r['p20']:.2f} to {r['p80']:.2f})"
            lines.append(f"| {name} | {spread} | {verdict(r['median'] >= GOAL)} |")
        lines.append("")
    if "maps" in rows:
        lines += [
            f"**Memory of the weights of one layer**, BERT-base, {rows['maps']['date']}, over a plain forward's:",
            "",
            f"| batch | peak of the process, goal {MEMORY_GOAL:g} | | rise above the weights |",
            "|---|---|---|---|",
        ]
        for at in rows["maps"]["shapes"]:
            shares = [at["maps"][k] / at["plain"][k] for k in ("peak", "added")]
            met = verdict(shares[0] <= MEMORY_GOAL)
            lines.append(f"| {at['B']} x {at['S']} | {shares[0]:.2f} | {met} | {shares[1]:.2f} |")
        lines.append("")
    m = results["machine"]
    footnote = f"{m['cpu']}, {m['threads']} threads, fastbert {m['versions']['fastbert']}."
    return "\n".join([*lines, filled(footnote)])


PARTS = {"integrated": integrated, "maps": maps}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--texts", type=int, default=16, help="texts of the test set")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "int8", help="folder of fine-tuning runs"
    )
    parser.add_argument("--out", type=Path, default=JSON, help="JSON that rows are merged into")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "B", "S"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("texts", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: pass 1 or more")
    return options


def main() -> None:
    """Measure, print, and write the JSON; the page only where the JSON is the repository's."""
    options = arguments()
    if options.measure:
        name, B, S = options.measure
        found = measure_memory(name, int(B), int(S))
        print(found["peak"], found["added"])
        return
    results = by_work(options.parts, options.out, lambda name: PARTS[name](options))
    print(table(results))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(results), BEGIN, END))


if __name__ == "__main__":
    main()
