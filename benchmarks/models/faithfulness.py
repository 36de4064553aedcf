"""How faithful attributions are: `python -m benchmarks.models.faithfulness --help`.

movies: the probability of the predicted class of a movie sentence; entities: that of a tag of CoNLL-2003. The models
are those of benchmarks.models.int8_accuracy. Every method is judged beside random orders on the same texts, and its
scores are compared with those of drawn weights. docs/interpret.md has the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import RESULTS, ROOT
from benchmarks.models.int8_accuracy import Finetuned, entity_model, movie_model
from benchmarks.models.summary import by_work
from benchmarks.report.readme import filled, replaced
from fastbert.files import write_text
from fastbert.finetune import Predictor
from fastbert.interpret import Explainer, Question, explain, judge, sanity

JSON = RESULTS / "faithfulness.json"
PAGE = ROOT / "docs" / "interpret.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.faithfulness -->", "<!-- end of table -->"
WORKS: dict[str, Callable[[Path], Finetuned]] = {"movies": movie_model, "entities": entity_model}
TITLES = {"movies": "movie sentences", "entities": "tags of CoNLL-2003"}
# {row: method and its options}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient": ("gradient", {}),
    "smooth": ("smooth", {}),
    "integrated, [MASK]": ("integrated", {"baseline": "mask"}),
    "integrated, [PAD]": ("integrated", {"baseline": "pad"}),
    "integrated, zeros": ("integrated", {"baseline": "zero"}),
    "permutation, [MASK]": ("permutation", {}),
    "permutation, removed": ("permutation", {"absent": "remove"}),
    "shap, [MASK]": ("shap", {}),
    "shap, removed": ("shap", {"absent": "remove"}),
    "rollout": ("rollout", {}),
    "gradient-rollout": ("gradient-rollout", {}),
}
# {figure: whether more of it is better}
FIGURES = {"comprehensiveness": True, "sufficiency": False, "area": True}
# texts need a few tokens for an order of them to matter
SHORTEST = 5


def questions(name: str, one: Finetuned, count: int) -> Iterator[tuple[Question, Question]]:
    """The first texts of the test set as questions for the logit, and for the probability that judges."""
    explainer = Explainer(one.model)
    # the labels are not used: what is explained is what the model predicts
    for example in Predictor(one.model).labelled(one.test, "test"):
        if count == 0:
            return
        kinds = []
        for probability in (False, True):
            if name == "movies":
                kinds.append(explainer.question(example.text, probability=probability))
            else:
                kinds.append(explainer.tagged(example.words, probability=probability))
        logit, judged = kinds
        told = not logit.target.name.startswith("O at ")
        if told and len(logit.players) >= SHORTEST:
            count -= 1
            yield logit, judged


def figures(pair: tuple[Question, Question], method: str, **options: Any) -> list[float]:
    """The FIGURES of one method on one text."""
    scores = explain(pair[0], method, **options).scores
    found = judge(pair[1], scores)
    return [getattr(found, name) for name in FIGURES]


def measured(name: str, one: Finetuned, options: argparse.Namespace) -> dict[str, Any]:
    """A row: the mean figures of every method and of every random order."""
    pairs = [*questions(name, one, options.texts)]
    if not pairs:
        raise ValueError(f"no text of {one.test} has {SHORTEST} tokens to explain")
    orders = [
        np.mean([figures(pair, "random", seed=1000 * seed + i) for i, pair in enumerate(pairs)], 0)
        for seed in range(options.orders)
    ]
    rows = {}
    for title, (method, given) in RUNS.items():
        given = {**given, "samples": 4} if options.quick and method in SAMPLED else given
        means = np.mean([figures(pair, method, **given) for pair in pairs], 0)
        checked = [sanity(q, method, **given) for q, _ in pairs[: options.sanity]]
        rows[title] = dict(zip(FIGURES, means.tolist(), strict=True))
        rows[title]["sanity"] = float(np.nanmean(checked))
        print(f"  {title}: {json.dumps(rows[title])}", flush=True)
    random = [dict(zip(FIGURES, o.tolist(), strict=True)) for o in orders]
    return {"texts": len(pairs), "random": random, "methods": rows}


SAMPLED = ("smooth", "permutation", "shap")


def table(results: dict[str, Any]) -> str:
    """The results as Markdown; a figure is bold where it is better than that of every random order."""
    lines = []
    for name, row in results["rows"].items():
        lines += [
            f"**{TITLES[name]}**, {row['texts']} texts, {row['date']}",
            "",
            "| method | comprehensiveness | sufficiency | area | sanity |",
            "|---|---|---|---|---|",
        ]
        spread = {f: [order[f] for order in row["random"]] for f in FIGURES}
        cells = [f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in spread.values()]
        lines.append(f"| random orders | {' | '.join(cells)} | |")
        for title, found in row["methods"].items():
            cells = []
            for f, more in FIGURES.items():
                better = found[f] > max(spread[f]) if more else found[f] < min(spread[f])
                cells.append(f"**{found[f]:.3f}**" if better else f"{found[f]:.3f}")
            lines.append(f"| {title} | {' | '.join(cells)} | {found['sanity']:.2f} |")
        lines.append("")
    m = results["machine"]
    footnote = (
        f"{m['cpu']}, fastbert {m['versions']['fastbert']}. Falls of the predicted class's probability. Bold: better "
        "than every random order. Sanity: the rank correlation with the scores of drawn weights, best near 0."
    )
    return "\n".join([*lines, filled(footnote)])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS])
    parser.add_argument("--texts", type=int, default=200, help="texts of each test set")
    parser.add_argument("--orders", type=int, default=10, help="random orders of all texts")
    parser.add_argument("--sanity", type=int, default=40, help="texts with drawn weights too")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "int8", help="folder of fine-tuning runs"
    )
    parser.add_argument("--quick", action="store_true", help="few samples and texts; pass --out")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON that rows are merged into")
    options = parser.parse_args()
    if options.quick:
        if options.out == JSON:
            parser.error("--quick measures figures of no use: pass --out FILE")
        options.texts, options.orders, options.sanity = 3, 2, 1
    for name in ("texts", "orders", "sanity"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: pass 1 or more")
    return options


def main() -> None:
    """Measure, print, and write the JSON; the page only where the JSON is the repository's."""
    options = arguments()

    def measure(name: str) -> dict[str, Any]:
        print(name, flush=True)
        return measured(name, WORKS[name](options.runs), options)

    results = by_work(options.works, options.out, measure)
    print(table(results))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(results), BEGIN, END))


if __name__ == "__main__":
    main()
