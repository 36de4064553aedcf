"""BERT, GPT and a bidirectional LSTM of one size, pretrained for equal time and fine-tuned, for contrasts.py.

All three read the State of the Union addresses with one tokenizer. Each takes its learning rate from one grid at a
third of the minutes. Then a word in the middle of held-out texts is guessed, and the models are fine-tuned on movie
sentences and on CoNLL-2003, at the best rate of a second grid, with several seeds. Every run is kept at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.models.contrasts_tasks import BERT, FORMS, GPT, LSTM, SIZES
from benchmarks.models.equal_time import Arms, once, run_name
from benchmarks.models.pretraining import COMMON, QUICK
from fastbert.bert import BertForMaskedLM, GPTForCausalLM
from fastbert.data.tokenizer import SpecialIds, vocabulary, word_starts
from fastbert.finetune import FinetuneConfig, finetune
from fastbert.pretrain import PretrainConfig
from fastbert.pretrain.feed import Feed
from fastbert.testing.labelled import conll2003, movie_sentences
from fastbert.train.metrics import read_metrics

# evaluations along a run of pretraining
POINTS = 8
# how many held-out texts have a word in their middle guessed, and of how many words the guess is chosen
PLACES, CHOICES = 500, 10
WORKS = {"movies": ("classify", "accuracy"), "entities": ("tag", "f1")}

# of all three: no text is read twice, so nothing is dropped
_ALL: dict[str, Any] = {
    **COMMON,
    "next_sentence": False,
    "max_tokens": 2048,
    "dropout": 0.0,
    "eval_every": 1,
    "eval_tokens": 20000,
}
# more masks than are judged give more to learn from in short runs
_MASKS = {"mask_prob": 0.3, "eval_mask_prob": 0.15}
_RECIPES: dict[str, dict[str, Any]] = {
    # from normal weights masked words stay at their frequencies for about a million tokens (pretrain/initial.py)
    BERT: {"recipe": "bert", "start": "neighbours", **_MASKS},
    GPT: {"recipe": "gpt"},
    # heads are no setting of an LSTM: 12 is the default
    LSTM: {"recipe": "lstm", "heads": 12, **_MASKS},
}


def settings(arm: str, options: argparse.Namespace, **more: Any) -> PretrainConfig:
    """The settings of a model's pretraining, all but the length."""
    layers, hidden = SIZES[FORMS[arm]]
    values = {**_ALL, "layers": layers, "hidden": hidden, "threads": options.threads}
    if options.quick:
        values |= {**QUICK, "max_tokens": 64}
    folders = {"sources": [str(options.texts)], "data_dir": str(options.runs / "data")}
    return PretrainConfig(**{**values, **_RECIPES[arm], **folders, **more})


def arms_of(options: argparse.Namespace) -> Arms:
    """The three models, timed on the threads that they are trained on."""
    made = partial(settings, options=options)
    return Arms(
        options, made, base=BERT, threads=options.threads, points=POINTS, judged=_pretrained
    )


def _pretrained(out: Path, config: PretrainConfig, batch: float) -> dict[str, Any]:
    """Held-out losses along a run, those of counting, and how much text was read."""
    lines = read_metrics(out / "metrics.jsonl")
    name = "lm_loss" if config.recipe == "gpt" else "mlm_loss_masked"
    points = [
        {"step": line["step"], "minutes": line["step"] * batch / 60, "loss": line[name]}
        for line in lines
        if line["kind"] == "eval"
    ]
    result = json.loads((out / "result.json").read_text())
    steps = result["steps"]
    loss = result["held_out"][name]
    tokens = [line["tokens"] for line in lines if "tokens" in line]
    return {
        "points": points,
        "loss": loss,
        "baselines": result["baselines"],
        "tokens": max(tokens, default=0),
        "steps": steps,
        "lr": config.lr,
        "seed": config.seed,
    }


# --- the word in the middle ---


def middles(feed: Feed, count: int, room: int) -> tuple[Tensor, Tensor]:
    """Held-out texts (N, room) of token ids, and the places (N,) of whole words near their middles."""
    tokenizer, shards = feed.tokenizer, feed.shards
    words = word_starts(tokenizer)
    plain = np.array([token.isalpha() for token in vocabulary(tokenizer)]) & words
    first = shards.sentences[shards.documents]
    texts, places = [], []
    for number in feed.heldout.documents:
        ids = shards.tokens[first[number] : first[number + 1]].astype(np.int64)
        for start in range(0, len(ids) - room + 1, room):
            text = ids[start : start + room]
            whole = np.flatnonzero(plain[text[:-1]] & words[text[1:]])
            if len(whole) and len(texts) < count:
                texts.append(text)
                places.append(int(whole[np.abs(whole - room // 2).argmin()]))
    return torch.from_numpy(np.stack(texts)), torch.tensor(places)


def choices(answers: Tensor, count: int) -> Tensor:
    """(N, count) words to choose from: the answer, then different ones drawn from the answers of all texts."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for answer in answers.tolist():
        order = answers[torch.randperm(len(answers), generator=draw)].tolist()
        rows.append([*dict.fromkeys([answer, *order])][:count])
    short = min(map(len, rows))
    return torch.tensor([row[:short] for row in rows])


@torch.no_grad()
def fill_in(folder: Path, causal: bool, feed: Feed) -> dict[str, Any]:
    """How often the word in the middle is a model's first guess, and the one that it chooses from CHOICES words.

    BERT and the BiLSTM guess behind [MASK], with the text on both sides. A GPT's first guess follows the text on the
    left; to choose, it scores the whole text with each word in its place.
    """
    room = feed.heldout.settings.max_length - 2
    texts, places = middles(feed, PLACES, room)
    answers = texts.gather(1, places[:, None])[:, 0]
    offered = choices(answers, CHOICES)
    model = (GPTForCausalLM if causal else BertForMaskedLM).from_pretrained(folder).eval()
    score = _from_left if causal else partial(_behind_mask, special=SpecialIds.of(feed.tokenizer))
    guessed = chosen = 0
    for i in range(len(texts)):
        guess, scores = score(model, texts[i], int(places[i]), offered[i])
        guessed += int(guess == answers[i])
        chosen += int(scores.argmax()) == 0
    n = len(texts)
    return {"first": guessed / n, "chosen": chosen / n, "texts": n, "choices": offered.shape[1]}


def _behind_mask(
    model: BertForMaskedLM, text: Tensor, place: int, offered: Tensor, special: SpecialIds
) -> tuple[int, Tensor]:
    """The first guess at a place, and the scores of the words that are offered."""
    masked = text.clone()
    masked[place] = special.mask
    ids = torch.tensor([[special.cls, *masked.tolist(), special.sep]])
    logits = _logits(model, ids)[0, place + 1]
    return int(logits.argmax()), logits[offered]


def _from_left(
    model: GPTForCausalLM, text: Tensor, place: int, offered: Tensor
) -> tuple[int, Tensor]:
    """The guess that follows what is on the left, and the log-probabilities of the text with each word in its place."""
    ids = text.repeat(len(offered), 1)
    ids[:, place] = offered
    scores = _logits(model, ids)[:, place - 1 : -1].log_softmax(-1)
    of_text = scores.gather(2, ids[:, place:, None])[..., 0].sum(1)
    return int(scores[0, 0].argmax()), of_text


def _logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids).logits
    return found


# --- fine-tuning ---


def labelled(work: str, runs: Path) -> dict[str, Any]:
    """The files of a task, as settings of a fine-tuning."""
    if work == "movies":
        train, test = movie_sentences(runs)
        return {"sources": [str(train)], "test": str(test)}
    train, validation, test = conll2003()
    return {"sources": [str(train)], "validation": str(validation), "test": str(test)}


def tuned(
    work: str, arm: str, lr: float, seed: int, model: Callable[[], Path], arms: Arms
) -> dict[str, Any]:
    """The figures of a fine-tuning, which is made once; `model` gives the folder to start from."""
    options = arms.options
    name = f"{work}-{run_name(arm, lr, options.steps, seed)}"
    task, metric = WORKS[work]

    def make() -> dict[str, Any]:
        config = FinetuneConfig(
            **labelled(work, options.runs),
            task=task,
            model=str(model()),
            lr=lr,
            steps=options.steps,
            eval_every=max(options.steps // 3, 1),
            checkpoint_every=options.steps,
            seed=seed,
            threads=options.threads,
            max_length=32 if options.quick else 128,
        )
        run = options.runs / name
        result = finetune(config, run, resume=(run / "config.toml").is_file(), quiet=True)
        assert result.test is not None
        figures = {"validation": result.validation[metric], "test": result.test[metric]}
        return {**figures, "lr": lr, "seed": seed}

    found: dict[str, Any] = once(options.out, "tuned", name, make)
    return found


# --- all stages ---


def learning(options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain, guess, fine-tune; prints each result as it is there."""
    arms = arms_of(options)
    arms.seconds_a_batch([*FORMS])
    found: dict[str, Any] = {"minutes": options.minutes, "steps": options.steps, "models": {}}
    for arm in FORMS:
        grid = {lr: arms.trained(arm, lr, options.minutes / 3, 0) for lr in options.rates}
        lr = min(grid, key=lambda lr: grid[lr]["loss"])
        run = arms.trained(arm, lr, options.minutes, 0)
        print(f"{arm}: rate {lr:g}, {run['loss']:.3f} nats at its own held-out places", flush=True)
        folder = partial(arms.model, arm, lr, options.minutes, 0)
        guesses = _guesses(arm, run_name(arm, lr, options.minutes, 0), folder, arms)
        print(f"{arm}: {guesses}", flush=True)
        losses = {f"{lr:g}": one["loss"] for lr, one in grid.items()}
        entry: dict[str, Any] = {"lr": lr, "grid": losses, **run, "fill_in": guesses}
        for work in WORKS:
            tried = {x: tuned(work, arm, x, 0, folder, arms) for x in options.tuning_rates}
            best = max(tried, key=lambda x: tried[x]["validation"])
            runs = [tuned(work, arm, best, s, folder, arms) for s in range(options.seeds)]
            print(f"{arm}, {work}: rate {best:g}, {[r['test'] for r in runs]}", flush=True)
            entry[work] = runs
        found["models"][arm] = entry
    return found


def _guesses(arm: str, name: str, folder: Callable[[], Path], arms: Arms) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        # texts and places are those of one data set for all three
        return fill_in(folder(), arm == GPT, arms.feed(arms.settings(BERT, steps=1)))

    found: dict[str, Any] = once(arms.options.out, "filled", name, make)
    return found
