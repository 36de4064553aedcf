"""What BERT, GPT and a bidirectional LSTM of one size learn of random symbols, and what they cost, for contrasts.py.

copy: the model names the first of d + 1 symbols at the last place. delay: at every place it names the symbol d places
back, so that an LSTM's state has to hold d symbols at every time; each distance has a model of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastbert
from fastbert.bert import BertConfig, BertModel
from fastbert.testing.timing import interleave

BERT, GPT, LSTM = "BERT", "GPT", "BiLSTM"
FORMS = {BERT: "bert", GPT: "gpt2", LSTM: "lstm"}
# layers and hidden size: the numbers of parameters are within 5 % of BERT's
SIZES = {"lstm": (3, 360), "bert": (4, 256), "gpt2": (4, 256)}
SMALL = {"lstm": (2, 104), "bert": (2, 64), "gpt2": (2, 64)}
SYMBOLS, ASKED = 16, 16
DISTANCES = (4, 8, 16, 32, 64, 128, 256)
LENGTHS = (16, 32, 64, 128, 256, 512)
# places of the delay task
SPAN = 64
DELAYS = (1, 2, 4, 8, 16, 32)


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


def learned(
    kind: str,
    symbols: int,
    steps: int,
    lr: float,
    loss: Callable[[int, Callable[[Tensor], Tensor], torch.Generator], Tensor],
) -> tuple[Callable[[Tensor], Tensor], torch.Generator, int]:
    """Train one encoder: `loss` is of the step, the model's logits (B, S, symbols) of ids, and the generator.

    Returns the logits of the trained model, the generator and the number of parameters.
    """
    model = encoder(kind, SMALL, symbols)
    head = nn.Linear(model.config.hidden_size, SYMBOLS)
    parameters = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr)
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min(1.0, (s + 1) / 50))
    draw = torch.Generator().manual_seed(1)

    def logits(ids: Tensor) -> Tensor:
        return head(model(ids).last_hidden_state)

    for step in range(steps):
        optimiser.zero_grad()
        loss(step, logits, draw).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        warm.step()
    model.eval()
    return logits, draw, sum(p.numel() for p in parameters)


def copied(kind: str, steps: int, lr: float) -> dict[str, Any]:
    """Train one encoder on all distances in turn; its accuracy at each of them."""

    def loss(step: int, logits: Any, draw: torch.Generator) -> Tensor:
        d = DISTANCES[step % len(DISTANCES)]
        # about as many tokens at every distance
        ids, wanted = copies(d, max(2048 // d, 16), draw)
        return nn.functional.cross_entropy(logits(ids)[:, -1], wanted)

    logits, draw, size = learned(kind, SYMBOLS + 1, steps, lr, loss)
    right = {}
    with torch.no_grad():
        for d in DISTANCES:
            ids, wanted = copies(d, 256, draw)
            guess = logits(ids)[:, -1].argmax(-1)
            right[str(d)] = float((guess == wanted).float().mean())
    return {"accuracy": right, "parameters": size, "lr": lr, "steps": steps}


def delayed(kind: str, d: int, steps: int, lr: float) -> dict[str, Any]:
    """Train one encoder to name the symbol d places back; its accuracy at places that have one."""

    def loss(step: int, logits: Any, draw: torch.Generator) -> Tensor:
        ids = torch.randint(0, SYMBOLS, (16, SPAN), generator=draw)
        return nn.functional.cross_entropy(logits(ids)[:, d:].flatten(0, 1), ids[:, :-d].flatten())

    logits, draw, size = learned(kind, SYMBOLS, steps, lr, loss)
    ids = torch.randint(0, SYMBOLS, (128, SPAN), generator=draw)
    with torch.no_grad():
        right = logits(ids)[:, d:].argmax(-1) == ids[:, :-d]
    accuracy = float(right.float().mean())
    return {"accuracy": accuracy, "parameters": size, "lr": lr, "steps": steps}


def copy_task(options: argparse.Namespace) -> dict[str, Any]:
    """{model: the best run of one grid of rates, by the mean accuracy}."""
    found = {}
    for name, kind in FORMS.items():
        runs = [copied(kind, options.copy_steps, lr) for lr in options.copy_rates]
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
