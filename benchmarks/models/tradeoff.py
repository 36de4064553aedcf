"""The metric of pruned models over their speed: `python -m benchmarks.models.tradeoff --help`.

A model that `fastbert finetune` trained is pruned to a list of speed-ups, and nothing is retrained. Each pruned model
is judged on the test set, and all are timed in turns with the dense one. Models are made once, in the folder --runs,
which benchmarks.models.compression shares: a rerun makes those that are missing, and measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.models.compression import (
    TITLES,
    WORKS,
    Seconds,
    in_form,
    parameters,
    pruned,
    race,
    seconds_of,
    spread,
    tested,
)
from benchmarks.models.int8_accuracy import Finetuned
from benchmarks.models.summary import by_work, percentiles, ratio
from fastbert.testing.peaks import peaks

JSON = RESULTS / "tradeoff.json"
SPEEDUPS = [1.25, 1.5, 2.0, 2.5, 3.0, 4.0]
# of the dense model itself
DENSE = 1.0


def points(
    one: Finetuned, folder: Path, speedups: list[float], quick: bool
) -> tuple[dict[float, Path], dict[float, str]]:
    """{speed-up: the model's folder}, and {speed-up: why no sizes reach it}."""
    found, failed = {DENSE: one.model}, {}
    for speedup in speedups:
        try:
            found[speedup] = pruned(one, folder, speedup, quick)
        except ValueError as error:
            failed[speedup] = str(error)
            print(f"  {speedup:g}: {error}", flush=True)
    return found, failed


def measured(
    one: Finetuned, folders: Mapping[float, Path], options: argparse.Namespace
) -> dict[str, Any]:
    """A row: the metric, the speed and the parameters of every model in `folders`."""
    rows, _, batches = tested(one, in_form(folders[DENSE], int8=False), options.limit)
    calls: dict[str, Seconds] = {}
    found: list[dict[str, Any]] = []
    for asked, folder in sorted(folders.items()):
        predictor = in_form(folder, int8=False)
        value = predictor.records(rows)[1][one.metric]
        found.append({"asked": asked, "value": value, "parameters": parameters(folder)})
        calls[f"{asked:g}"] = seconds_of(predictor.model, batches)
        print(f"  {asked:g}: {one.metric} {value:.4f}", flush=True)
    chosen = spread(len(batches), options.batches)
    around = {"before": peaks()}
    samples, _ = race(calls, chosen, options.rounds)
    around["after"] = peaks()
    for point in found:
        seconds = samples[f"{point['asked']:g}"]
        point["seconds"] = percentiles(seconds)
        point["speed"] = ratio(samples[f"{DENSE:g}"], seconds)
    return {
        "examples": len(rows),
        "metric": one.metric,
        "batches": len(chosen),
        "rounds": options.rounds,
        "tokens": sum(len(batches[i]["input_ids"]) for i in chosen),
        "peaks": around,
        "points": found,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for name, row in results["rows"].items():
        metric = "entity F1" if row["metric"] == "f1" else row["metric"]
        lines += [
            f"**{TITLES[name].format(**row)}**, {row['date']}",
            "",
            f"| asked for | times as fast | parameters | {metric} | of dense |",
            "|---|---|---|---|---|",
        ]
        dense = row["points"][0]["value"]
        for point in row["points"]:
            speed = "{median:.2f} ({p20:.2f} to {p80:.2f})".format(**point["speed"])
            share = f"{point['value'] / dense:.2%}" if dense else "--"
            size = f"{point['parameters'] / 1e6:.1f} M"
            value = f"{100 * point['value']:.2f}"
            lines.append(f"| {point['asked']:g} | {speed} | {size} | {value} | {share} |")
        lines += ["", *(f"- {asked}: {reason}" for asked, reason in row["failed"].items()), ""]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=["movies"])
    parser.add_argument(
        "--speedups", nargs="+", type=float, default=SPEEDUPS, help="times as fast as the model"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "int8", help="folder of models and runs"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=8, help="batches that are timed")
    parser.add_argument("--limit", type=int, help="examples of the test set that are read")
    parser.add_argument(
        "--quick", action="store_true", help="prune by few examples, in a folder of its own"
    )
    parser.add_argument("--out", type=Path, default=JSON, help="JSON that rows are merged into")
    options = parser.parse_args()
    for name in ("rounds", "batches", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}: pass 1 or more")
    for speedup in options.speedups:
        if not 1.0 < speedup < float("inf"):
            parser.error(f"--speedups has {speedup:g}: pass numbers above 1, such as 2.0")
    if options.quick and options.out == JSON:
        parser.error("--quick measures models of no use: pass --out FILE")
    return options


def main() -> None:
    """Make models, measure, print, and write JSON and plot."""
    from benchmarks.report.plots import draw_tradeoff

    options = arguments()

    def measure(name: str) -> dict[str, Any]:
        one = WORKS[name](options.runs)
        folder = options.runs / ("quick" if options.quick else "compression") / name
        folder.mkdir(parents=True, exist_ok=True)
        folders, failed = points(one, folder, options.speedups, options.quick)
        row = measured(one, folders, options)
        return {**row, "failed": {f"{speedup:g}": reason for speedup, reason in failed.items()}}

    results = by_work(options.works, options.out, measure)
    print(table(results))
    print(draw_tradeoff(results, options.out.with_suffix(".png")))


if __name__ == "__main__":
    main()
