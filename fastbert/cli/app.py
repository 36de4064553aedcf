"""The `fastbert` command: training, a trained model on text, smaller models, and this machine.

Its help needs no torch.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastbert.backend.names import StaleModuleError
from fastbert.cli.distil import distill
from fastbert.cli.explain import explain_text
from fastbert.cli.finetune import finetune, predict
from fastbert.cli.pretrain import pretrain
from fastbert.cli.prune import prune
from fastbert.cli.quantize import quantize
from fastbert.cli.settings import ready
from fastbert.cli.text import embed, fill_mask, generate
from fastbert.cli.trim import trim
from fastbert.cli.tune import tune
from fastbert.files import shortened

# characters of an error: a library's message may hold a whole text
LONGEST = 1000

app = typer.Typer(
    name="fastbert",
    help="Train and use BERT-class encoders.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _command(name: str, function: Callable[..., None], bare: bool = False) -> None:
    # typer would keep the source's line breaks inside paragraphs
    text = inspect.cleandoc(function.__doc__ or "")
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    app.command(name, help="\n\n".join(paragraphs), no_args_is_help=not bare)(function)


_command("pretrain", pretrain)
_command("finetune", finetune)
_command("distill", distill)
_command("predict", predict)
_command("fill-mask", fill_mask)
_command("embed", embed)
_command("generate", generate)
_command("explain-text", explain_text)
_command("quantize", quantize)
_command("prune", prune)
_command("trim", trim)
_command("tune", tune, bare=True)


@app.callback(invoke_without_command=True)
def start(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train and use BERT-class encoders.

    Every command takes --help. An error is one sentence and exit code 2; --debug, after any command, or
    FASTBERT_DEBUG=1 shows where it came from.
    """
    if version:
        from fastbert import __version__

        typer.echo(f"fastbert {__version__}")
        raise typer.Exit


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, the machine, how the native modules were built, and which kernel backends are there."""
    ready()
    from fastbert.backend import chooser, cpu, cuda
    from fastbert.machine import machine_info

    facts = machine_info()
    if cpu.native is None:
        facts["native module"] = {"missing": cpu.unavailable}
    else:
        chosen = f"{cpu.native.isa()} (of {' '.join(cpu.native.isas())})"
        facts["native module"] = {"instruction set": chosen, **cpu.native.build_info()}
    if cuda.native is None:
        facts["cuda module"] = {"missing": cuda.unavailable}
    else:
        facts["cuda module"] = {"devices": cuda.native.devices(), **cuda.native.build_info()}
    matrix = chooser.matrix()
    if as_json:
        typer.echo(json.dumps({**facts, "backends": matrix}, indent=2))
        return
    for name, value in facts.items():
        _print_fact(name, value)
    _print_matrix(matrix)


def _print_fact(name: str, value: Any, indent: str = "") -> None:
    if isinstance(value, dict):
        typer.echo(f"{indent}{name}")
        for inner, content in value.items():
            _print_fact(inner, content, indent + "  ")
    else:
        typer.echo(f"{indent}{name:<{24 - len(indent)}} {value}")


def _print_matrix(matrix: dict[str, dict[str, str | None]]) -> None:
    """The table of ops and backends, then why each missing one is missing: a reason, and the ops that share it."""
    backends = list(next(iter(matrix.values())))
    typer.echo("\n" + f"{'op':<24} " + " ".join(f"{name:<9}" for name in backends))
    for slug, row in matrix.items():
        marks = ["-" if row[name] else "yes" for name in backends]
        typer.echo(f"{slug:<24} " + " ".join(f"{mark:<9}" for mark in marks))
    reasons: dict[str, list[str]] = {}
    for name in backends:
        for slug, row in matrix.items():
            if reason := row[name]:
                # the op is named after the reason, so that ops with the same reason share a line
                reasons.setdefault(f"{name}: {reason.replace(f' {slug} ', ' such ')}", []).append(
                    slug
                )
    typer.echo("\nmissing:" if reasons else "\nnothing is missing")
    for reason, slugs in reasons.items():
        ops = "every op" if len(slugs) == len(matrix) else ", ".join(slugs)
        typer.echo(f"  {reason} ({ops})")


def main(arguments: list[str] | None = None) -> None:
    """Run the `fastbert` command line and exit."""
    run_app(app, sys.argv[1:] if arguments is None else arguments, "fastbert")


def run_app(app: typer.Typer, arguments: list[str], name: str) -> None:
    """Run and exit: 0, 1 for an abort, 2 with a sentence for an error, 128 + n after a checkpoint for signal n."""
    # at any place: users add it to the end of a line that has just failed
    debug = "--debug" in arguments or bool(os.environ.get("FASTBERT_DEBUG"))
    try:
        app([word for word in arguments if word != "--debug"], prog_name=name)
    except Exception as error:
        if debug or not _is_expected(error):
            raise
        code = getattr(error, "exit_code", 2)
        prefix = "" if code > 128 else "error: "
        print(prefix + shortened(" ".join(str(error).split()), LONGEST), file=sys.stderr)
        sys.exit(code)


def _is_expected(error: Exception) -> bool:
    """Whether the message is a sentence for the user; anything else is a bug, and its traceback is wanted."""
    if isinstance(error, (ValueError, TypeError, IndexError, OSError, StaleModuleError)):
        return True
    # the modules of these exceptions import torch
    from fastbert.backend.chooser import Unsupported
    from fastbert.data.fetch import FetchError
    from fastbert.train.loop import Stopped
    from fastbert.train.trainer import TrainingError
    from fastbert.train.world import PeerLost

    return isinstance(error, (Unsupported, FetchError, PeerLost, Stopped, TrainingError))
