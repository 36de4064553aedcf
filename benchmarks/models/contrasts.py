"""BERT, GPT and a bidirectional LSTM of one size: `python -m benchmarks.models.contrasts [--parts copy costs]`.

copy: small encoders learn to name the first of d + 1 tokens at the last place, all else random, for each d of a list;
accuracy against d. costs: a training step and inference of 32 sequences of 128 tokens, in turns, as ratios to BERT's,
and the latency of one text against its length. Parts are kept in the JSON of the results at once: a rerun makes those
that are missing. docs/contrasts.md has the tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastbert
from benchmarks import RESULTS, ROOT
from benchmarks.report.readme import replaced
from fastbert.bert import BertConfig, BertModel
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.testing.timing import interleave
from fastbert.train.plot import figure, save

JSON, PLOT = RESULTS / "contrasts.json", RESULTS / "contrasts.png"
PAGE = ROOT / "docs" / "contrasts.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.contrasts -->", "<!-- end of table -->"
PARTS = ("copy", "costs")
BERT = "BERT"
FORMS = {BERT: "bert", "GPT": "gpt2", "BiLSTM": "lstm"}
# layers and hidden size: the numbers of parameters are within 5 % of BERT's
SIZES = {"lstm": (3, 360), "bert": (4, 256), "gpt2": (4, 256)}
SMALL = {"lstm": (2, 104), "bert": (2, 64), "gpt2": (2, 64)}
SYMBOLS, ASKED = 16, 16
DISTANCES = (4, 8, 16, 32, 64, 128, 256)
LENGTHS = (16, 32, 64, 128, 256, 512)


def encoder(kind: str, sizes: dict[str, tuple[int, int]], vocabulary: int) -> BertModel:
    """A fresh encoder without pooler and without dropout."""
    layers, hidden = sizes[kind]
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            model_type=kind,
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            intermediate_size=4 * hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            type_vocab_size=0,
            pad_token_id=None if kind == "gpt2" else 0,
            initializer_range=0.05,
        ),
        add_pooler=False,
    )


def copies(d: int, batch: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, d + 2) ids that end with the question, and (B,) the symbols in front."""
    ids = torch.randint(0, SYMBOLS, (batch, d + 2), generator=draw)
    ids[:, -1] = ASKED
    return ids, ids[:, 0]


def copied(kind: str, steps: int, lr: float) -> dict[str, Any]:
    """Train one encoder on all distances in turn; its accuracy at each of them."""
    model = encoder(kind, SMALL, SYMBOLS + 1)
    head = nn.Linear(model.config.hidden_size, SYMBOLS)
    parameters = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr)
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min(1.0, (s + 1) / 50))
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        d = DISTANCES[step % len(DISTANCES)]
        # about as many tokens at every distance
        ids, wanted = copies(d, max(2048 // d, 16), draw)
        logits = head(model(ids).last_hidden_state[:, -1])
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits, wanted).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        warm.step()
    right = {}
    with torch.no_grad():
        for d in DISTANCES:
            ids, wanted = copies(d, 256, draw)
            guess = head(model.eval()(ids).last_hidden_state[:, -1]).argmax(-1)
            right[str(d)] = float((guess == wanted).float().mean())
    size = sum(p.numel() for p in parameters)
    return {"accuracy": right, "parameters": size, "lr": lr, "steps": steps}


def copy_task(options: argparse.Namespace) -> dict[str, Any]:
    """The best rate of one grid for each model, by the mean accuracy."""
    found = {}
    for name, kind in FORMS.items():
        runs = [copied(kind, options.steps, lr) for lr in options.rates]
        found[name] = max(runs, key=lambda run: sum(run["accuracy"].values()))
    return found


def costs(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a training step, of inference, and of one text of each length, as ratios to BERT's."""
    sizes = SMALL if options.quick else SIZES
    models = {name: encoder(kind, sizes, 8000) for name, kind in FORMS.items()}
    size = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    ids = torch.randint(5, 8000, (32, 128))

    def train(model: BertModel) -> None:
        model.train().zero_grad()
        model(ids).last_hidden_state.square().mean().backward()

    @torch.no_grad()
    def infer(model: BertModel, ids: Tensor) -> None:
        model(ids)

    rounds = 2 if options.quick else 9
    work: dict[str, Any] = {n: lambda m=m: train(m) for n, m in models.items()}  # type: ignore[misc]
    found: dict[str, Any] = {"training": interleave(work, rounds=rounds, warmup=1)}
    for model in models.values():
        fastbert.freeze(model)
    work = {n: lambda m=m: infer(m, ids) for n, m in models.items()}  # type: ignore[misc]
    found["inference"] = interleave(work, rounds=rounds, warmup=1)
    for S in LENGTHS:
        one = ids.flatten()[None, :S]
        work = {n: lambda m=m, x=one: infer(m, x) for n, m in models.items()}  # type: ignore[misc]
        found[str(S)] = interleave(work, rounds=4 * rounds, warmup=2)
    base = {what: times[BERT].median for what, times in found.items()}
    ratios = {w: {n: t.median / base[w] for n, t in times.items()} for w, times in found.items()}
    return {"parameters": size, "ratios": ratios, "seconds": base}


def report(results: dict[str, Any]) -> str:
    """The tables of docs/contrasts.md, of the parts that were measured."""
    lines: list[str] = []
    if found := results.get("costs"):
        ratios = found["ratios"]
        lines += [
            "| beside BERT | parameters | training step | inference | "
            + " | ".join(f"one text, S = {S}" for S in LENGTHS)
            + " |",
            "|---" * (4 + len(LENGTHS)) + "|",
        ]
        columns = ("training", "inference", *map(str, LENGTHS))
        for name, size in found["parameters"].items():
            cells = [f"{ratios[what][name]:.2f}" for what in columns]
            lines.append(f"| {name} | {size / 1e6:.2f} M | {' | '.join(cells)} |")
        lines += ["", "Time / BERT's time per token, medians of interleaved rounds.", ""]
    if found := results.get("copy"):
        lines += [
            "| accuracy after d tokens | parameters | lr | "
            + " | ".join(f"{d}" for d in DISTANCES)
            + " |",
            "|---" * (3 + len(DISTANCES)) + "|",
        ]
        for name, run in found.items():
            cells = [f"{run['accuracy'][str(d)]:.0%}" for d in DISTANCES]
            size = f"{run['parameters'] / 1e3:.0f} k"
            lines.append(f"| {name} | {size} | {run['lr']:g} | {' | '.join(cells)} |")
        steps = found[BERT]["steps"]
        lines += [
            "",
            f"Chance is {1 / SYMBOLS:.0%}; {steps} steps, one seed, the best of one grid of rates.",
        ]
    return "\n".join(lines).rstrip()


def draw(results: dict[str, Any], image: Path) -> None:
    """Accuracy against distance, and latency against length."""
    picture = figure()
    if found := results.get("copy"):
        axes = picture.add_subplot(1, 2, 1, xlabel="distance d", ylabel="accuracy", xscale="log")
        for name, run in found.items():
            axes.plot(DISTANCES, [run["accuracy"][str(d)] for d in DISTANCES], ".-", label=name)
        axes.legend()
    if found := results.get("costs"):
        axes = picture.add_subplot(1, 2, 2, xlabel="length S", ylabel="time / BERT's", xscale="log")
        for name in FORMS:
            axes.plot(LENGTHS, [found["ratios"][str(S)][name] for S in LENGTHS], ".-", label=name)
    save(picture, image)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--steps", type=int, default=1000, help="of the copy task")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3], help="the grid")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON of the results")
    options = parser.parse_args()
    torch.set_num_threads(2)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for part in options.parts:
        if part not in results:
            results |= {part: {"copy": copy_task, "costs": costs}[part](options), **machine_info()}
            write_text(options.out, json.dumps(results, indent=1) + "\n")
    print(report(results))
    if not options.quick and options.out == JSON:
        draw(results, PLOT)
        page = PAGE.read_text(encoding="utf-8")
        write_text(PAGE, replaced(page, report(results), BEGIN, END))


if __name__ == "__main__":
    main()
