"""`fastbert pretrain`; its flags are the fields of PretrainConfig."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.train.config import PretrainConfig, check_length_said, load_settings, merge


def pretrain(**flags: Any) -> None:
    """Pretrain a BERT (masked words and next sentences) or a RoBERTa (masked words) on text.

    Settings come from flags, or from a --config file (lines such as `lr = 1e-4`, the flags' names with _ for -);
    flags win. OUT then holds config.toml (all settings), metrics.jsonl, tensorboard/, checkpoints/, loss.png and
    model/, which transformers loads as well. SIGTERM and Ctrl-C end a run after a checkpoint; --resume goes on from the
    last one, also after a crash, with the same losses as without the interruption.

    Example: fastbert pretrain texts/ --out runs/a --steps 10000 --layers 6 --hidden 384 --heads 6
    """
    out, file = flags.pop("out"), flags.pop("config")
    resume, rebuild, quiet = (flags.pop(name) for name in ("resume", "rebuild", "quiet"))
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    settings = merge(load_settings(file) if file else {}, given)
    if not resume:
        check_length_said(settings)
    config = None if resume else PretrainConfig(**settings)
    _pretrain(config, settings, out, rebuild, quiet)


def _pretrain(
    config: PretrainConfig | None, settings: dict[str, Any], out: Path, rebuild: bool, quiet: bool
) -> None:
    # torch is imported here, when flags and file are known to be good
    from fastbert.train import run

    resume = config is None
    if config is None:
        config = run.resumed(out, settings)
    result = run.pretrain(
        config, out, resume=resume, rebuild=rebuild, quiet=quiet, say=None if quiet else _say
    )
    for line in run.summary(result):
        typer.echo(line)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _parameters() -> list[inspect.Parameter]:
    """The command's parameters: a few of its own, then one for every setting."""
    own: list[tuple[str, Any, Any]] = [
        ("out", Annotated[Path, typer.Option(help="folder of the run")], inspect.Parameter.empty),
        (
            "config",
            Annotated[Path | None, typer.Option(help="TOML or YAML file of settings")],
            None,
        ),
        (
            "resume",
            Annotated[bool, typer.Option("--resume", help="go on with the run in OUT")],
            False,
        ),
        (
            "rebuild",
            Annotated[bool, typer.Option("--rebuild", help="tokenise again in a stale --data-dir")],
            False,
        ),
        ("quiet", Annotated[bool, typer.Option("--quiet", help="show no progress")], False),
    ]
    hints = typing.get_type_hints(PretrainConfig)
    for f in dataclasses.fields(PretrainConfig):
        own.append((f.name, Annotated[_optional(hints[f.name]), _flag(f)], None))
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, annotation, default in own
    ]


def _optional(hint: Any) -> Any:
    return hint if type(None) in typing.get_args(hint) else hint | None


def _flag(f: dataclasses.Field[Any]) -> Any:
    comment = f.metadata["comment"]
    if f.name == "sources":
        return typer.Argument(help=comment, show_default=False)
    if f.default is not None:
        comment += f"; default {str(f.default).lower()}"
    name = "--" + f.name.replace("_", "-")
    if isinstance(f.default, bool):
        name += "/--no-" + f.name.replace("_", "-")
    return typer.Option(name, help=comment, rich_help_panel=f.metadata["group"])


pretrain.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
