"""Size, metric and speed of a model's compressed forms: `python -m benchmarks.models.compression --help`.

Dense, int8, pruned, distilled and products of these, of models that `fastbert finetune` trains from MiniLM; beside
onnxruntime and ctranslate2 in int8 on the dense model. All are timed in turns on the same batches of the test set.
Models are made once, in the folder --runs: a rerun measures only. docs/compress.md has the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastbert
from benchmarks import RESULTS, ROOT
from benchmarks.models.compression_peers import PRECISIONS, Peers
from benchmarks.models.int8_accuracy import Finetuned, entity_model, movie_model
from benchmarks.models.students import DISTILLED as DISTILLED_STUDENT
from benchmarks.models.students import LOSSES, STUDENT, trained
from benchmarks.models.summary import by_work, percentiles, ratio
from benchmarks.peers.driver import WorkerError
from benchmarks.report.readme import duration, filled, replaced
from fastbert.cli.prune import prune
from fastbert.data import Batch
from fastbert.distil import DistilConfig, distil
from fastbert.files import write_text
from fastbert.finetune import Predictor
from fastbert.finetune.judge import Part
from fastbert.finetune.records import read_records
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import rotated

JSON = RESULTS / "compression.json"
PAGE = ROOT / "docs" / "compress.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.compression -->", "<!-- end of table -->"

WORKS = {"movies": movie_model, "entities": entity_model}
TITLES = {
    "movies": "MiniLM-L6 fine-tuned, {examples:,} movie sentences",
    "entities": "MiniLM-L6 fine-tuned, CoNLL-2003's test set of {examples:,} sentences",
}
DENSE, PRUNED, BOTH = "dense", "pruned 2.0", "pruned 3.0, distilled"
DISTILLED = f"distilled {STUDENT}"
# {form: (its model, whether the encoder's weights are int8)}
FORMS = {
    f"{model}{', int8' if int8 else ''}": (model, int8)
    for model in (DENSE, PRUNED, BOTH, DISTILLED)
    for int8 in (False, True)
}
# {form: (least share of the dense model's metric, least speed-up)}
GOALS: dict[str, tuple[float, float | None]] = {
    PRUNED: (0.985, 1.9),
    f"{PRUNED}, int8": (0.98, 3.4),
    BOTH: (0.98, 2.85),
    DISTILLED: (0.97, None),
}
BATCH = 32
# a function of a batch's number
Seconds = Callable[[int], float]


# --- models ---


def models(
    work: str, one: Finetuned, folder: Path, students: Path, quick: bool = False
) -> dict[str, Path]:
    """{model: its folder}; what is not in the folders yet is made: two are pruned, two distilled from the dense one.

    The student of a few layers is the first one of benchmarks.models.students.
    """
    small, smaller = (pruned(one, folder, speedup, quick) for speedup in (2.0, 3.0))
    return {
        DENSE: one.model,
        PRUNED: small,
        BOTH: distilled(one, folder / "pruned-3-distilled", smaller, quick),
        DISTILLED: trained(DISTILLED_STUDENT, work, one, 0, students, quick),
    }


def pruned(one: Finetuned, folder: Path, speedup: float, quick: bool) -> Path:
    """The dense model pruned to a speed-up; what is not in `folder` yet is made."""
    out = folder / f"pruned-{speedup:g}"
    if not out.is_dir():
        prune(one.model, one.train, out, speedup, examples=128 if quick else 2048)
    return out


def distilled(one: Finetuned, run: Path, student: Path, quick: bool) -> Path:
    """The student in a folder, trained further by distillation from the dense model."""
    if not (run / "result.json").is_file():
        config = DistilConfig(
            teacher=str(one.model),
            sources=[str(one.train)],
            student=str(student),
            losses=LOSSES,
            **({"steps": 4} if quick else {"epochs": 3.0}),
        )
        if one.validation is not None and not quick:
            config.validation = str(one.validation)
        distil(config, run, resume=run.is_dir(), say=print)
    return run / "model"


def in_form(folder: Path, int8: bool) -> Predictor:
    """A model ready for inference: its encoder frozen, or with int8 weights in place of fp32."""
    predictor = Predictor(folder, BATCH)
    if int8:
        fastbert.quantize(predictor.model, replace=True)
    else:
        fastbert.freeze(predictor.model)
    return predictor


# --- measurement ---


def measured(
    one: Finetuned, folders: Mapping[str, Path], folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """A row: every form's and peer's figures. `folders` are {model: its folder}, `folder` keeps converted models."""
    dense = in_form(folders[DENSE], int8=False)
    rows, part, batches = tested(one, dense, options.limit)
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Seconds] = {}
    for name, (model, int8) in FORMS.items():
        predictor = in_form(folders[model], int8)
        calls[name] = seconds_of(predictor.model, batches)
        value = predictor.records(rows)[1][one.metric]
        # after a forward, which makes the copies
        size = sum(fastbert.weight_bytes(predictor.model).values())
        found[name] = {"parameters": parameters(folders[model]), "bytes": size, "value": value}
        print(f"  {name}: {one.metric} {value:.4f}", flush=True)
    with Peers(one.model, folder / "peers", batches) as peers:
        for name in options.peers:
            found[name] = {"peer": True}
            try:
                calls[name] = peers.start(name)
                found[name]["value"] = peers.metrics(name, dense, part)[one.metric]
                print(f"  {name}: {one.metric} {found[name]['value']:.4f}", flush=True)
            except WorkerError as error:
                calls.pop(name, None)
                found[name] = {"peer": True, "reason": str(error)}
        chosen = spread(len(batches), options.batches)
        around = {"before": peaks()}
        samples, failed = race(calls, chosen, options.rounds)
        around["after"] = peaks()
        versions = peers.versions
    for name, seconds in samples.items():
        found[name]["seconds"] = percentiles(seconds)
        found[name]["speed"] = ratio(samples[DENSE], seconds)
    for name, reason in failed.items():
        found[name] = {"peer": True, "reason": reason}
    return {
        "examples": len(rows),
        "metric": one.metric,
        "batches": len(chosen),
        "rounds": options.rounds,
        "tokens": sum(len(batches[i]["input_ids"]) for i in chosen),
        "peaks": around,
        "environments": versions,
        "forms": found,
    }


def tested(
    one: Finetuned, dense: Predictor, limit: int | None
) -> tuple[list[dict[str, Any]], Part, list[Batch]]:
    """The test set, at most `limit` examples of it: as records, as a part of the data, and as batches of inputs."""
    rows = [dict(r.values) for r in read_records(one.test, "test", conll=True)][:limit]
    part = Part.of(dense.labelled(rows), dense.task, dense.tokenizer, dense.model.config)
    return rows, part, [Batch(batch.inputs) for batch in part.features.batches(BATCH)]


def parameters(folder: Path) -> int:
    """The number of a model's parameters."""
    return sum(p.numel() for p in Predictor(folder).model.parameters())


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` batches, evenly spaced."""
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]


def seconds_of(model: Any, batches: Sequence[Batch]) -> Seconds:
    """A function that times a call on a batch, after one that is not counted, as peers/worker.py does."""

    @torch.inference_mode()
    def call(number: int) -> float:
        model(**batches[number])
        started = time.perf_counter()
        model(**batches[number])
        return time.perf_counter() - started

    return call


def race(
    calls: Mapping[str, Seconds], batches: Sequence[int], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """{name: seconds of all batches in each round}, in turns, in an order that rotates, and {name: why it failed}."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in rotated([*samples], number):
            try:
                samples[name].append(sum(map(calls[name], batches)))
            except WorkerError as error:
                del samples[name]
                failed[name] = str(error)
    return samples, failed


# --- the table ---


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: the plot, and a table for each work."""
    parts = ["![metric over speed](../benchmarks/results/compression.png)", ""]
    for name, title in TITLES.items():
        if name in results["rows"]:
            row = results["rows"][name]
            metric = "entity F1" if row["metric"] == "f1" else row["metric"]
            lines = [
                f"**{title.format(**row)}**",
                "",
                f"| | parameters | weights | {metric} | of dense | times as fast | goal |",
                "|---|---|---|---|---|---|---|",
            ]
            forms = row["forms"]
            shown = [(form, f) for form, f in forms.items() if "speed" in f]
            lines += [f"| {' | '.join(_cells(form, f, forms[DENSE]))} |" for form, f in shown]
            reasons = [f"- {form}: {f['reason']}" for form, f in forms.items() if "reason" in f]
            lines += ["", *reasons, *([""] if reasons else []), filled(_footnote(row)), ""]
            parts += lines
    m, v = results["machine"], results["machine"]["versions"]
    machine = f"{m['cpu']} ({m['instructions']}), {m['threads']} threads, fastbert {v['fastbert']}, torch {v['torch']}."
    return "\n".join([*parts, filled(machine)])


def _cells(form: str, figures: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    share, speed = figures["value"] / dense["value"], figures["speed"]
    size = ["--", "--"]
    if "peer" not in figures:
        size = [f"{figures['parameters'] / 1e6:.1f} M", f"{figures['bytes'] / 1e6:.1f} MB"]
    times = "1" if form == DENSE else "{median:.2f} ({p20:.2f} to {p80:.2f})".format(**speed)
    goal = "; ".join(
        f"{text}: {'met' if met else '**missed**'}"
        for text, met in goals(form, share, speed["median"])
    )
    name = f"{form} of the dense model" if "peer" in figures else form
    return [name, *size, f"{100 * figures['value']:.2f}", f"{share:.2%}", times, goal]


def goals(form: str, share: float, speed: float) -> list[tuple[str, bool]]:
    """A form's goals, and whether each is met."""
    if form not in GOALS:
        return []
    least, times = GOALS[form]
    found = [(f"{100 * least:g}%", share >= least)]
    return found if times is None else [*found, (f"{times:g} times", speed >= times)]


def _footnote(row: dict[str, Any]) -> str:
    seconds = row["forms"][DENSE]["seconds"]["median"]
    peak = " and ".join(
        f"{row['peaks'][when].get('fma_gflops_fp32', 0):.0f}" for when in ("before", "after")
    )
    used = {k: v for found in row["environments"].values() for k, v in found.items()}
    names = [f"{name} {used[name]}" for name in ("onnxruntime", "ctranslate2") if name in used]
    text = (
        f"{row['date']}: {row['rounds']} rounds of {row['batches']} batches, {row['tokens']:,} tokens, in which the "
        f"dense model takes {duration(seconds)}. Multiply-adds on registers: {peak} GFLOP/s before and after."
    )
    return " ".join([text, *([f"{', '.join(names)}."] if names else [])])


# --- the command ---


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS])
    parser.add_argument(
        "--peers", nargs="*", choices=PRECISIONS, default=[*PRECISIONS], help="others"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "int8", help="folder of models and runs"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=8, help="batches that are timed")
    parser.add_argument("--limit", type=int, help="examples of the test set that are read")
    parser.add_argument(
        "--quick", action="store_true", help="models made in a few steps, in a folder of their own"
    )
    parser.add_argument("--out", type=Path, default=JSON, help="JSON that rows are merged into")
    options = parser.parse_args()
    for name in ("rounds", "batches", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}: pass 1 or more")
    if options.quick and options.out == JSON:
        parser.error("--quick measures models of no use: pass --out FILE")
    return options


def main() -> None:
    """Make models, measure, print, and write JSON and plot; the page only where the JSON is the repository's."""
    from benchmarks.report.plots import draw_compression

    options = arguments()

    def measure(name: str) -> dict[str, Any]:
        one = WORKS[name](options.runs)
        folder = options.runs / ("quick" if options.quick else "compression") / name
        folder.mkdir(parents=True, exist_ok=True)
        students = folder if options.quick else options.runs / "students"
        found = models(name, one, folder, students, options.quick)
        return measured(one, found, folder, options)

    results = by_work(options.works, options.out, measure)
    print(table(results))
    draw_compression(results, options.out.with_suffix(".png"))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(results), BEGIN, END))


if __name__ == "__main__":
    main()
