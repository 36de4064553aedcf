"""The parameters of a command that trains, and the settings that follow from them and from files."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.backend import names
from fastbert.train.settings import (
    Config,
    Settings,
    check_unused,
    load_settings,
    merge,
    recorded,
    settings_of,
)

Parameter = tuple[str, Any, Any]


def say(text: str) -> None:
    """Print a line to standard error."""
    typer.echo(text, err=True)


def ready() -> None:
    """Import torch; refuse what FASTBERT_BACKEND or FASTBERT_CPU_ISA asks for and this machine or package lacks.

    A command calls it after the checks of its own arguments: the import of torch takes seconds.
    """
    if names.WHY_NOT_FORCED is not None:
        raise ValueError(names.WHY_NOT_FORCED)
    from fastbert.backend import chooser

    if chooser.misset is not None:
        raise ValueError(chooser.misset)


def configured(
    kind: type[Config],
    out: Path,
    resume: bool,
    flags: Mapping[str, Any],
    check: Callable[[Config], object],
) -> Config:
    """The settings of a run: those recorded in OUT to resume it, else of --config and flags, after the `check` of them.

    Raises ValueError, TypeError or OSError for settings and folders that can't be used.
    """
    given = {n: v for n, v in flags.items() if n != "config" and v not in (None, [])}
    settings = merge(load_settings(flags["config"], kind) if flags["config"] else {}, given)
    if resume:
        return recorded(out, settings, kind)
    config = kind(**settings)
    check_unused(out)
    check(config)
    return config


def signature(kind: type[Settings], *own: Parameter) -> inspect.Signature:
    """The signature that typer reads: out, config, resume, quiet, the command's `own`, and every setting of `kind`."""
    out = Annotated[Path, typer.Option(help="folder of the run")]
    config = Annotated[Path | None, typer.Option(help="TOML or YAML file of settings")]
    resume = Annotated[bool, typer.Option("--resume", help="go on with the run in OUT")]
    quiet = Annotated[bool, typer.Option("--quiet", help="show no progress")]
    parameters: list[Parameter] = [
        ("out", out, inspect.Parameter.empty),
        ("config", config, None),
        ("resume", resume, False),
        *own,
        ("quiet", quiet, False),
    ]
    hints = typing.get_type_hints(kind)
    for f in settings_of(kind):
        parameters.append(
            (f.name, Annotated[_optional(hints[f.name]), _flag(f, hints[f.name])], None)
        )
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter(name, keyword, default=default, annotation=annotation)
            for name, annotation, default in parameters
        ]
    )


def _optional(hint: Any) -> Any:
    return hint if type(None) in typing.get_args(hint) else hint | None


def _flag(f: dataclasses.Field[Any], hint: Any) -> Any:
    comment = f.metadata["comment"]
    # the words of a command line without a flag are a list
    if f.default_factory is not dataclasses.MISSING or f.metadata["positional"]:
        return typer.Argument(help=comment, show_default=False)
    if f.default is not None:
        comment += f"; default {str(f.default).lower()}"
    name = "--" + f.name.replace("_", "-")
    if hint is bool or bool in typing.get_args(hint):
        name += "/--no-" + f.name.replace("_", "-")
    return typer.Option(name, help=comment, rich_help_panel=f.metadata["group"])
