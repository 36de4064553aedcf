"""A GPT-2 small of random weights beside transformers': `python -m benchmarks.models.decoding [--rows NAME ...]`.

transformers computes with sdpa and its dynamic cache. Before a row is timed, the greedy tokens must be equal, or the
losses must agree. Every round times both in turns; the figure is the ratio round by round: the median, with p20 and
p80. Decoding is the time of 33 new tokens without that of one, a 32nd of it, and its figure is the bytes of the weights
in it per second, as a share of what a copy of 256 MB reads and writes in the same round. docs/generate.md has the
table; --quick tries everything with small models.
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

import fastbert
from benchmarks import RESULTS, ROOT
from benchmarks.models.families import LENGTHS
from benchmarks.report.readme import filled, replaced
from fastbert.bert import GPTForCausalLM
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import rotated

JSON = RESULTS / "decoding.json"
PAGE = ROOT / "docs" / "generate.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.decoding -->", "<!-- end of table -->"
NEW = 32
PREFILL, STEP = "prompts of 41 % real tokens, one new token", "training step, 41 % real tokens"
# row: (prompts of a decoding, the goal: a share of the copy bandwidth, or times as fast as transformers)
ROWS: dict[str, tuple[int | None, float]] = {
    "decoding, 1 text": (1, 0.8),
    "decoding, 8 texts": (8, 0.8),
    PREFILL: (None, 2.0),
    STEP: (None, 1.5),
}
Calls = dict[str, Callable[[], Any]]


def build(quick: bool, folder: Path) -> tuple[GPTForCausalLM, Any]:
    """Ours, frozen, and transformers', with the same random weights; `quick` makes them small."""
    import transformers

    small = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 500} if quick else {}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).eval()
    theirs.save_pretrained(folder)
    ours = GPTForCausalLM.from_pretrained(folder)
    return fastbert.freeze(ours), theirs  # type: ignore[return-value]


def texts(ours: GPTForCausalLM, theirs: Any, prompts: list[torch.Tensor], count: int) -> Calls:
    """`count` new tokens of every prompt, greedy; transformers pads on the left."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([(torch.arange(-longest, 0) >= -len(p)).long() for p in prompts])

    def stock() -> Any:
        given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": count}
        with torch.inference_mode():
            found = theirs.generate(ids, eos_token_id=None, pad_token_id=0, **given)
        return found[:, longest:]

    return {
        "stock": stock,
        "fastbert": lambda: torch.stack(fastbert.generate(ours, prompts, count)),
    }


def steps(ours: GPTForCausalLM, theirs: Any) -> Calls:
    """A training step with AdamW on a batch of which 41 % are tokens, padded on the right."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(4, ours.config.vocab_size, mask.shape).where(mask.bool(), 0)
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }

    def call(model: Any) -> Callable[[], Any]:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step() -> Any:
            loss = model(**given).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    with torch.no_grad():
        a, b = ours(**given).loss, theirs(**given).loss
    assert abs(a - b) < 1e-4 * b, f"the losses differ: {a} and {b}"
    return {"stock": call(theirs.train()), "fastbert": call(fastbert.unfreeze(ours).train())}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bandwidth(quick: bool) -> Callable[[], float]:
    """Measures the bytes a second that a copy reads and writes, of the fastest of five."""
    source = torch.ones(2**20 if quick else 2**26)
    target = torch.empty_like(source)
    return lambda: 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(5))


def measured(row: str, quick: bool, rounds: int, folder: Path) -> dict[str, Any]:
    """The result of one row. Raises AssertionError where the two do not agree."""
    ours, theirs = build(quick, folder)
    count, goal = ROWS[row]
    generator = torch.Generator().manual_seed(1)
    lengths = LENGTHS if count is None else (64,) * count
    vocabulary = ours.config.vocab_size
    prompts = [torch.randint(4, vocabulary, (n,), generator=generator) for n in lengths]
    short = texts(ours, theirs, prompts, 1)
    calls = short if count is None else texts(ours, theirs, prompts, 1 + NEW)
    if row == STEP:
        calls = steps(ours, theirs)
    else:
        assert torch.equal(calls["stock"](), calls["fastbert"]()), f"{row}: other tokens"
    copy = bandwidth(quick)
    weights = ours.bert.embeddings.word.weight.nbytes
    weights += sum(p.nbytes for p in ours.bert.layers.parameters())
    taken: dict[str, list[float]] = {name: [] for name in calls}
    shares: list[float] = []
    for number in range(-1, rounds):
        for name in rotated(list(calls), number):
            seconds = timed(calls[name])
            if count is not None:
                seconds = (seconds - timed(short[name])) / NEW
            if number >= 0:
                taken[name].append(seconds)
            if number >= 0 and count is not None and name == "fastbert":
                shares.append(weights / seconds / copy())
    ratios = [a / b for a, b in zip(taken["stock"], taken["fastbert"], strict=True)]
    found = {
        "ratio": spread(ratios),
        "seconds": float(np.median(taken["fastbert"])),
        "rounds": rounds,
        "goal": goal,
    }
    return found | ({"share": spread(shares)} if shares else {})


def spread(values: list[float]) -> dict[str, float]:
    """The median with p20 and p80."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| GPT-2 small, fp32 | times as fast as transformers | share of the copy bandwidth | goal |",
        "|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        r, share, goal = row["ratio"], row.get("share"), row["goal"]
        value = r["median"] if share is None else share["median"]
        shown = f"{goal}x" if share is None else f"{goal:.0%}"
        part = "" if share is None else "{median:.0%} ({p20:.0%} to {p80:.0%})".format(**share)
        lines.append(
            f"| {name} | {r['median']:.2f} ({r['p20']:.2f} to {r['p80']:.2f}) | {part} | "
            f"{shown}: {'met' if value >= goal else '**missed**'} |"
        )
    texts = [
        "In brackets p20 to p80 of interleaved rounds. Random weights; prompts of 64 tokens for decoding, else "
        f"{sum(LENGTHS)} tokens in {len(LENGTHS)} x {max(LENGTHS)}; AdamW included in the step."
    ]
    measured: dict[str, list[str]] = {}
    for name, row in found["rows"].items():
        measured.setdefault(_circumstances(row), []).append(name)
    for circumstances, names in measured.items():
        which = "" if len(measured) == 1 else f"{'; '.join(names)}: "
        texts.append(f"{which}{circumstances}.")
    return "\n".join([*lines, "", filled(" ".join(texts))])


def _circumstances(row: dict[str, Any]) -> str:
    """When, where and in how many rounds a row was measured."""
    m, (before, after) = row["machine"], row["peaks"]
    v = m["versions"]
    return (
        f"{m['date']}, {m['cpu']} ({m['instructions']}), {m['threads']} threads, {row['rounds']} rounds, fastbert "
        f"{v['fastbert']}, torch {v['torch']}, transformers {v['transformers']}; multiply-adds on registers "
        f"{before:.0f} and {after:.0f} GFLOP/s before and after"
    )


def kept_rows(out: Path) -> dict[str, Any]:
    """The rows of a JSON, each with its machine, date and peaks; an older form has them once for all."""
    found = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    common = {name: found[name] for name in ("machine", "peaks") if name in found}
    return {name: common | row for name, row in found["rows"].items()}


def main() -> int:
    """Measure, print, write; the page only where the JSON is the repository's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, to see it run")
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of every row")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON to write; rows in it are kept")
    options = parser.parse_args()
    import tempfile

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kept, facts = kept_rows(options.out), {"machine": machine_info()}
    before = peaks(1.0 if options.quick else 4.0)["fma_gflops_fp32"]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.rows:
            rounds = 2 if options.quick else options.rounds
            kept[name] = facts | measured(name, options.quick, rounds, Path(folder))
            print(name, json.dumps(kept[name]["ratio"]), flush=True)
    around = [before, peaks(1.0 if options.quick else 4.0)["fma_gflops_fp32"]]
    for name in options.rows:
        kept[name]["peaks"] = around
    found = {"rows": {name: kept[name] for name in ROWS if name in kept}}
    write_text(options.out, json.dumps(found, indent=1) + "\n")
    print(table(found))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(found), BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
