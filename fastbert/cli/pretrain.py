"""`fastbert pretrain`; its flags are the fields of PretrainConfig."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from fastbert.cli.settings import configured, ready, say, signature
from fastbert.pretrain.build import check_usable
from fastbert.pretrain.config import PretrainConfig


def pretrain(**flags: Any) -> None:
    """Pretrain a BERT (masked words and next sentences), a RoBERTa or ModernBERT (masked words), a GPT (next words), or
    models of images and their captions.

    Settings come from flags, or from a --config file (lines such as `lr = 1e-4`, the flags' names with _ for -);
    flags win. OUT then holds config.toml (all settings), metrics.jsonl, tensorboard/, checkpoints/, loss.png and
    model/, which transformers loads as well unless it is one of images. SIGTERM and Ctrl-C end a run after a
    checkpoint; --resume goes on from the last one, also after a crash, with the same losses as without the
    interruption.

    Example: fastbert pretrain texts/ --out runs/a --steps 10000 --layers 6 --hidden 384 --heads 6

    Example: fastbert pretrain --images photos --recipe two-towers --out runs/b --epochs 30 --layers 6 --hidden 384
    """
    out, resume, quiet = (flags.pop(name) for name in ("out", "resume", "quiet"))
    rebuild = flags.pop("rebuild")
    config = configured(PretrainConfig, out, resume, flags, partial(check_usable, out=out))
    ready()
    from fastbert.pretrain import run

    result = run.pretrain(
        config, out, resume=resume, rebuild=rebuild, quiet=quiet, say=None if quiet else say
    )
    for line in run.summary(result) if result.main else ():
        typer.echo(line)


_REBUILD = (
    "rebuild",
    Annotated[bool, typer.Option("--rebuild", help="tokenise again in a stale --data-dir")],
    False,
)
pretrain.__signature__ = signature(PretrainConfig, _REBUILD)  # type: ignore[attr-defined]
