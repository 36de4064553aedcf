"""`fastbert distill`; its flags are the fields of DistilConfig."""

from __future__ import annotations

from functools import partial
from typing import Any

import typer

from fastbert.cli.settings import configured, ready, say, signature
from fastbert.distil.config import DistilConfig
from fastbert.distil.models import usable


def distill(**flags: Any) -> None:
    """Train a small model, the student, to give what a large one, the teacher, gives.

    Text for a teacher that was pretrained, labelled data for one that was fine-tuned, sentences for one that gives
    vectors. The student has sizes such as 3x384 and starts from layers of the teacher, or it is a model folder, such as
    a pruned one. OUT then holds model/, of the best evaluation, config.toml, metrics.jsonl, checkpoints/, result.json
    and curves.png. SIGTERM and Ctrl-C end a run after a checkpoint; --resume goes on from the last one.

    Example: fastbert distill runs/a train.csv --student 3x384 --out runs/small
    """
    out, resume, quiet = (flags.pop(name) for name in ("out", "resume", "quiet"))
    config = configured(DistilConfig, out, resume, flags, partial(usable, out=out))
    ready()
    from fastbert.distil import run

    result = run.distil(config, out, resume=resume, quiet=quiet, say=None if quiet else say)
    if result.main:
        for line in run.summary(result):
            typer.echo(line)


distill.__signature__ = signature(DistilConfig)  # type: ignore[attr-defined]
