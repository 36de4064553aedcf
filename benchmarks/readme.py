"""Writes README's measured table from benchmarks/results/bert.json: `python benchmarks/readme.py [--check]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- table: python benchmarks/readme.py -->", "<!-- end of table -->"
WORK = {
    "train": "training step (MLM + NSP, dropout, AdamW)",
    "infer": "inference, last hidden state",
}
FILL = {"real": "41 % real tokens", "full": "no padding"}


def table(results: dict) -> str:
    """The Markdown table and the line that says what it was measured on."""
    lines = [
        "| BERT-base, B = 8, S = 128 | precision | speed against transformers |",
        "|---|---|---|",
    ]
    for row in results["rows"]:
        ratio = f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        lines.append(f"| {WORK[row['work']]}, {FILL[row['fill']]} | {row['precision']} | {ratio} |")
    m, v = results["machine"], results["machine"]["versions"]
    lines.append("")
    lines.append(
        f"{m['date']}, {m['cpu']}, {m['threads']} threads, torch {v['torch']}, transformers {v['transformers']} "
        "(SDPA, eager); medians of interleaved rounds, in brackets p20 to p80."
    )
    return "\n".join(lines)


def main() -> int:
    """Rewrite README between the markers; with --check only say whether it is up to date."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "bert.json").read_text())
    before, rest = text.split(BEGIN)
    new = f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
