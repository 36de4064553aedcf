"""A step of distillation beside what it is made of: `python -m benchmarks.models.distil_step [--quick] [--out FILE]`.

The teacher is a masked LM of 6 layers x 384 with random weights, the student has 3 of its layers; a batch is 4,096
packed tokens of English sentences' lengths, 15 % of them labelled. Each round times, in turns: a plain step of the
student on labels alone, the frozen forward of the teacher, a step for each set of losses. docs/distill.md
has the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.report.readme import filled, replaced
from fastbert.bert import BertConfig, BertForMaskedLM
from fastbert.data import Batch
from fastbert.distil import DistilConfig
from fastbert.distil.losses import terms
from fastbert.distil.plan import Plan
from fastbert.distil.student import Distillation, build_student
from fastbert.distil.teacher import Teacher
from fastbert.distil.work import Text
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import interleave

JSON = RESULTS / "distil_step.json"
PAGE = ROOT / "docs" / "distill.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.distil_step -->", "<!-- end of table -->"

# a step may take so many times as long as a plain step and the teacher's forward together
GOAL = 1.4
SETS = ("relations", "soft,labels,hidden", "soft:5,labels:2,cosine:1", "soft,labels,attention:0.1")
TOKENS, VOCABULARY = 4096, 30522


def batch(tokens: int) -> Batch:
    """Packed sequences of 8 to 60 tokens, 15 % of the tokens labelled."""
    torch.manual_seed(0)
    lengths = torch.randint(8, 61, (tokens // 34,))
    total = int(lengths.sum())
    labels = torch.randint(1000, VOCABULARY, (total,))
    rows = torch.rand(total) < 0.15
    return Batch(
        input_ids=torch.randint(1000, VOCABULARY, (total,)),
        token_type_ids=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        max_seqlen=int(lengths.max()),
        labels=labels.masked_fill(~rows, -100),
        label_rows=rows.nonzero()[:, 0],
    )


def step(model: Any, losses: str, given: Batch) -> tuple[Callable[[], None], Callable[[], object]]:
    """A step of a student of `model` on these losses, and the teacher's part of it."""
    config = DistilConfig(teacher="random", student="3x384", data="text", losses=losses)
    # what Text does with a model needs none of its data
    work = SimpleNamespace(head=lambda width: None)
    work.signals = lambda *arguments: Text.signals(work, *arguments)  # type: ignore[arg-type]
    student = build_student(config, model, BertForMaskedLM)
    plan = Plan.of(config, model.config, student.config)
    trained = Distillation(student, plan, work, model.config).train()
    teacher = Teacher(model, work, plan.wanted(1), int8=False)
    optimiser = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], fused=True)
    counts = terms(given, len(given["label_rows"]))

    def call() -> None:
        trained(given, teacher(given), counts).sum().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return call, lambda: teacher(given)


def measure(quick: bool) -> dict[str, Any]:
    """Seconds of every step, and the steps / (plain step + teacher) round by round."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    model = BertForMaskedLM(BertConfig(num_hidden_layers=6, vocab_size=VOCABULARY, **sizes)).eval()
    given = batch(TOKENS // 16 if quick else TOKENS)
    calls = {losses: step(model, losses, given)[0] for losses in SETS}
    plain = step(model, "labels", given)[0]
    whole = step(model, "soft,labels,hidden", given)[1]
    before = peaks(1.0 if quick else 6.0)
    timed = interleave({"plain": plain, "teacher": whole, **calls}, rounds=3 if quick else 9)
    after = peaks(1.0 if quick else 6.0)
    median = {name: timing.median for name, timing in timed.items()}
    parts = median["plain"] + median["teacher"]
    return {
        "tokens": len(given["input_ids"]),
        "seconds": {name: vars(timing) for name, timing in timed.items()},
        "ratio": {name: median[name] / parts for name in SETS},
        "peaks": [before, after],
    }


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| step | times a plain step and the teacher's forward | goal |", "|---|---|---|"]
    for name, value in found["ratio"].items():
        met = "met" if value <= GOAL else "**missed**"
        lines.append(f"| `{name}` | {value:.2f} | at most {GOAL}: {met} |")
    m = found["machine"]
    v = m["versions"]
    share = found["seconds"]["teacher"]["median"] / found["seconds"]["plain"]["median"]
    lines += [
        "",
        filled(
            f"{m['date']}, {m['cpu']} ({m['instructions']}), {m['threads']} threads, fastbert {v['fastbert']}, torch "
            f"{v['torch']}: medians of rounds in turns; {found['tokens']} tokens, teacher 6 x 384, student 3 x 384, "
            f"AdamW included. The teacher's frozen forward takes {share:.2f} of a plain step."
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write; the page only where the JSON is the repository's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see it run")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON to write")
    options = parser.parse_args()
    found = {**measure(options.quick), "machine": machine_info()}
    write_text(options.out, json.dumps(found, indent=1) + "\n")
    print(table(found))
    print(json.dumps(found["peaks"]))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(found), BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
