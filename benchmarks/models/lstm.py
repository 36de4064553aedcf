"""fastbert.nn.LSTM beside torch's: `python -m benchmarks.models.lstm [--quick]`.

Forward + backward of 32 sequences of up to 128 tokens, 41 % of the padded batch, fp32: ours on packed tokens and on the
PackedSequence, torch on the PackedSequence and on the padded batch, with the same weights. Nothing is timed unless ours
agrees with torch on the PackedSequence in outputs and all gradients, that of the input included. Each round times all
of them in turns; a ratio is theirs / ours round by round: the median, with p20 and p80. Then ours on 0.25 to 4 times as
many sequences: the cost per real token. docs/modules.md has the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

from benchmarks import RESULTS, ROOT
from benchmarks.report.readme import replaced
from benchmarks.report.tables import markdown
from fastbert import nn
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import rotated

JSON = RESULTS / "lstm.json"
PAGE = ROOT / "docs" / "modules.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.lstm -->", "<!-- end of table -->"
LENGTHS = (128, 30, 45, 22, 80, 17, 60, 33)
# row: the arguments of the constructor
ROWS: dict[str, dict[str, Any]] = {
    "256 units, 2 layers, both directions": {
        "input_size": 256,
        "hidden_size": 256,
        "num_layers": 2,
        "bidirectional": True,
    },
    "512 units, 1 layer, one direction": {"input_size": 512, "hidden_size": 512},
    "128 units, 1 layer, both directions": {
        "input_size": 128,
        "hidden_size": 128,
        "bidirectional": True,
    },
}
OURS, ON_SEQUENCE, SEQUENCE, PADDED = (
    "ours, packed",
    "ours, PackedSequence",
    "torch, PackedSequence",
    "torch, padded",
)
# what torch's inputs cost beside our packed tokens, at least
GOALS = {SEQUENCE: 3.0, PADDED: 1.3}
SCALES = (0.25, 0.5, 1, 2, 4)

Step = Callable[[], list[Tensor]]


def flops(options: dict[str, Any], tokens: int) -> int:
    """Of the products of forward and backward."""
    H, D = options["hidden_size"], 1 + options.get("bidirectional", False)
    widths = [options["input_size"], *[D * H] * (options.get("num_layers", 1) - 1)]
    return sum(3 * 2 * tokens * D * 4 * H * (width + H) for width in widths)


def step(
    model: torch.nn.LSTM, x: Tensor, call: Callable[[Tensor], Any], rows: Callable[[Tensor], Tensor]
) -> Step:
    """Forward + backward of one call: outputs, gradients of x and of all parameters.

    `rows` gives the tokens of an output, or of a gradient of x, in packed order.
    """
    x = x.clone().requires_grad_()
    leaves = [x, *model.parameters()]
    upstream: list[Tensor] = []

    def run() -> list[Tensor]:
        y = call(x)[0]
        y = rows(y.data if isinstance(y, PackedSequence) else y)
        if not upstream:
            upstream.append(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        dx, *others = torch.autograd.grad(y, leaves, upstream[0])
        return [y.detach(), rows(dx), *others]

    return run


def steps(
    options: dict[str, Any], lengths: tuple[int, ...], only: str | None = None
) -> dict[str, Step]:
    """The step of each implementation, with the same weights on the same sequences."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(**options, batch_first=True)
    ours = nn.LSTM(**options, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    parts = [torch.randn(n, options["input_size"]) for n in lengths]
    sequence = pack_sequence(parts, enforce_sorted=False)
    where = {
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
    }
    token = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    numbers = torch.arange(sum(lengths)).split(lengths)
    back = pack_sequence(list(numbers), enforce_sorted=False).data.argsort()

    def on_sequence(model: torch.nn.LSTM) -> Step:
        def call(data: Tensor) -> Any:
            return model(PackedSequence(data, *sequence[1:]))

        return step(model, sequence.data, call, lambda t: t[back])

    made = {
        OURS: step(ours, torch.cat(parts), lambda x: ours(x, **where), lambda t: t),
        ON_SEQUENCE: on_sequence(ours),
        SEQUENCE: on_sequence(theirs),
        PADDED: step(theirs, pad_sequence(parts, batch_first=True), theirs, lambda t: t[token]),
    }
    return made if only is None else {only: made[only]}


def agree(calls: dict[str, Step]) -> float:
    """The largest difference of outputs and gradients, over the norm; AssertionError above 1e-4.

    Torch on its PackedSequence is the truth. On the padded batch the second direction begins with padding: it computes
    something else.
    """
    truth = calls[SEQUENCE]()
    worst = 0.0
    for name in (OURS, ON_SEQUENCE):
        for found, expected in zip(calls[name](), truth, strict=True):
            worst = max(worst, float((found - expected).norm() / expected.norm()))
    assert worst < 1e-4, f"ours and torch's differ by {worst:.1e}: not timed"
    return worst


def taken(calls: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name in rotated(list(calls), number):
            started = time.perf_counter()
            calls[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: Any) -> dict[str, float]:
    """The median and the 20th and 80th percentiles."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def measured(options: dict[str, Any], lengths: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """A row: agreement, times, ratios to ours on packed tokens, operations per second, cost against tokens."""
    calls = steps(options, lengths)
    error = agree(calls)
    seconds = taken(calls, rounds)
    ours = np.array(seconds[OURS])
    scaled = {
        scale: steps(options, (lengths * 4)[: int(scale * len(lengths))], OURS)[OURS]
        for scale in SCALES
    }
    costs = taken({str(scale): run for scale, run in scaled.items()}, rounds)
    return {
        "error": error,
        "tokens": sum(lengths),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": {name: spread(np.array(v) / ours) for name, v in seconds.items() if name != OURS},
        "gflops": flops(options, sum(lengths)) / float(np.median(ours)) / 1e9,
        "per_token": {
            str(scale): spread(
                np.array(costs[str(scale)])
                / sum((lengths * 4)[: int(scale * len(lengths))])
                / (np.array(costs["1"]) / sum(lengths))
            )
            for scale in SCALES
        },
    }


def ratio(values: dict[str, float]) -> str:
    """A ratio with its spread."""
    return f"{values['median']:.2f}x ({values['p20']:.2f} to {values['p80']:.2f})"


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown, with the machine."""
    names = (SEQUENCE, PADDED, ON_SEQUENCE)
    lines = []
    for name, row in found["rows"].items():
        costs = ", ".join(f"{row['per_token'][str(scale)]['median']:.2f}" for scale in SCALES)
        cells = [ratio(row["ratios"][peer]) for peer in names]
        before, after = row["peaks"]
        share = f"{200 * row['gflops'] / (before + after):.0f} % ({before:.0f}, {after:.0f})"
        lines.append([name, *cells, share, costs])
    scales = ", ".join(f"{scale:g}" for scale in SCALES)
    header = ["layer", *(f"{name} / ours" for name in names[:2]), "ours, PackedSequence / packed"]
    header += [
        "ours, of the FMA peak (GFLOP/s before, after)",
        f"cost per token at {scales} times the sequences",
    ]
    goals = ", ".join(f"{name} at least {goal}x" for name, goal in GOALS.items())
    m = found["machine"]
    note = f"Goals: {goals}. {m['cpu']}, {m['threads']} threads, torch {m['versions']['torch']}, {m['date']}."
    return "\n".join([*markdown(header, lines), "", note])


def main() -> int:
    """Measure the rows, write the JSON, and the table into docs/modules.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="few short sequences, to see it run")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of every row")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON to write; rows in it are kept")
    options = parser.parse_args()
    lengths = (9, 2, 5, 3) if options.quick else LENGTHS * 4
    seconds = 0.5 if options.quick else 3.0
    kept = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    for name in options.rows:
        before = peaks(seconds)["fma_gflops_fp32"]
        row = measured(ROWS[name], lengths, 2 if options.quick else options.rounds)
        kept[name] = row | {"peaks": [before, peaks(seconds)["fma_gflops_fp32"]]}
        print(name, json.dumps(kept[name]), flush=True)
    found = {
        "rows": {name: kept[name] for name in ROWS if name in kept},
        "machine": machine_info(),
    }
    write_text(options.out, json.dumps(found, indent=1) + "\n")
    print(table(found))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(found), BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
