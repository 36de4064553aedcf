"""A corpus of made-up sentences and settings that pretrain on it within a second or two."""

import os
import random
import signal

import torch

ADJECTIVES = ["great", "small", "old", "new", "public", "common", "foreign", "free"]
NOUNS = ["union", "people", "nation", "treaty", "army", "bank", "road", "river", "law", "peace"]
VERBS = ["serves", "needs", "builds", "keeps", "loves", "fears"]


def sentence(draw):
    one, other = draw.choice(NOUNS), draw.choice(NOUNS)
    return f"The {draw.choice(ADJECTIVES)} {one} {draw.choice(VERBS)} the {draw.choice(ADJECTIVES)} {other}."


def write_corpus(folder, documents=12, seed=0):
    """Text files of some paragraphs each."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for i in range(documents):
        paragraphs = [" ".join(sentence(draw) for _ in range(6)) for _ in range(5)]
        (folder / f"{i:02}.txt").write_text("\n\n".join(paragraphs) + "\n")
    return folder


def tiny_settings(corpus, **settings):
    """Keyword arguments of PretrainConfig, with `settings` in the place of the defaults."""
    given = {
        "sources": [str(corpus)],
        "heldout": 0.2,
        "vocab_size": 120,
        "layers": 2,
        "hidden": 32,
        "heads": 2,
        "max_length": 48,
        "max_position": 64,
        "max_tokens": 256,
        "steps": 12,
        "lr": 3e-3,
        "threads": 1,
        "backend": "torch",
        "log_every": 1,
        "eval_every": 5,
        "eval_tokens": 500,
        "checkpoint_every": 4,
        "device": "cpu",
    }
    return given | settings


def losses(out):
    """All lines of a run's metrics.jsonl without their times; an interruption must not change them."""
    from fastbert.train.metrics import read_metrics

    timed = ("seconds", "tokens_per_s")
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def make_old(checkpoint):
    """Rewrite a checkpoint as version 0.1 wrote it: sums of losses in three fields, whether used or not."""
    state = torch.load(checkpoint, weights_only=True)
    window = state["position"].pop("window")
    state["position"] |= {
        "window_loss": window["loss"],
        "window_mlm": window.get("mlm_loss", window["loss"]),
        "window_nsp": window.get("nsp_loss", 0.0),
    }
    torch.save(state, checkpoint)


def die():
    """Kill this process, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def sabotaged_save(state, file, *, count=[0], **_):  # noqa: B006 -- counts the calls of this process
    """torch.save that kills its process in the middle of the second file."""
    count[0] += 1
    if count[0] == 2:
        file.write_bytes(b"half of a checkpoint")
        die()
    original_save(state, file)


original_save = torch.save
original_replace = os.replace


def sabotaged_replace(source, target):
    """os.replace that kills its process just before the checkpoint of step 8 gets its name."""
    if str(target).endswith("step-00000008.pt"):
        die()
    original_replace(source, target)


def train(settings, out, resume=False, sabotage=None):
    """The target of a child process; exits with the code of a stopped run."""
    from fastbert.train import PretrainConfig, pretrain
    from fastbert.train.loop import Stopped

    if sabotage == "half":
        torch.save = sabotaged_save
    if sabotage == "unnamed":
        os.replace = sabotaged_replace
    try:
        pretrain(PretrainConfig(**settings), out, resume=resume, quiet=True)
    except Stopped as stop:
        os._exit(stop.exit_code)
