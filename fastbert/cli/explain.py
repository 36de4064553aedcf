"""`fastbert explain-text`: which words a model's answer comes from."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert import files
from fastbert.cli.settings import ready, say
from fastbert.files import quoted, why_not_text
from fastbert.finetune.config import trained_model

_FORMATS = (".html", ".png", ".json")

Model = Annotated[Path, typer.Argument(help="model folder, or OUT of a fine-tuning run")]
Text = Annotated[str, typer.Argument(help="text; a question for a model of answers")]
Second = Annotated[
    str | None,
    typer.Argument(help="second text of a pair; the text that a question is answered from"),
]
Method = Annotated[
    str,
    typer.Option(help="gradient, integrated, smooth, permutation, shap, rollout, gradient-rollout"),
]
Aim = Annotated[
    str | None,
    typer.Option(
        help="class, tag, word behind [MASK], or start, end or span; default what the model predicts"
    ),
]
At = Annotated[
    int | None,
    typer.Option(
        help="number, from 0, of the tagged word or the [MASK]; default the first word with a tag"
    ),
]
Steps = Annotated[int | None, typer.Option(help="points of integrated; default 50")]
Baseline = Annotated[
    str | None, typer.Option(help="of integrated: mask, pad or zero; default mask")
]
Samples = Annotated[
    int | None, typer.Option(help="of smooth, permutation and shap; default 25, 20 and 1000")
]
Absent = Annotated[
    str | None,
    typer.Option(help="what permutation and shap do to words: mask or remove; default mask"),
]
Seed = Annotated[int | None, typer.Option(help="of methods that draw; default 0")]
Layer = Annotated[
    int | None, typer.Option(help="number of a layer, from 0: --out shows its attention too")
]
Out = Annotated[Path | None, typer.Option(help=".html, .png or .json to write")]


def explain_text(
    model: Model,
    text: Text,
    second: Second = None,
    method: Method = "integrated",
    target: Aim = None,
    at: At = None,
    steps: Steps = None,
    baseline: Baseline = None,
    samples: Samples = None,
    absent: Absent = None,
    seed: Seed = None,
    attention: Layer = None,
    out: Out = None,
) -> None:
    """Print how much each word adds to what a model says, as a coloured table.

    Takes a fine-tuned model, a masked LM with a text with [MASK], and a sentence encoder with two texts.

    Example: fastbert explain-text runs/reviews "A splendid film." --out why.html
    """
    if out is not None and out.suffix not in _FORMATS:
        raise ValueError(
            f"--out {out} ends in {quoted(out.suffix)}: choose one of {', '.join(_FORMATS)}"
        )
    if attention is not None and (out is None or out.suffix == ".json"):
        raise ValueError(
            "--attention is shown on a page or a picture: pass --out FILE.html or .png"
        )
    for name, value in (("TEXT", text), ("SECOND", second)):
        if value is not None and (reason := why_not_text(value)):
            raise ValueError(f"{name} {reason}")
    trained_model(model)
    ready()
    from rich.console import Console

    from fastbert.interpret import Explainer, explain
    from fastbert.interpret.pages import summary, table
    from fastbert.interpret.rollout import heads_of

    given = {"steps": steps, "baseline": baseline, "samples": samples}
    options = _options(method, {**given, "absent": absent, "seed": seed})
    question = Explainer(model).question(text, second, target=target, at=at)
    heads = {} if attention is None else heads_of(question, [attention])
    found = explain(question, method, **options)
    console = Console(highlight=False)
    console.print(summary(found), markup=False)
    console.print(table(found))
    if out is not None:
        _write(out, found, heads)


def _options(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; refuses one that the method does not have."""
    from fastbert.interpret import METHODS

    options = {name: value for name, value in given.items() if value is not None}
    if method in METHODS:  # explain() refuses another
        known = inspect.signature(METHODS[method]).parameters
        for name in options:
            if name not in known:
                raise ValueError(f"--{name} is no option of the method {method}: leave it out")
    return options


def _write(out: Path, found: Any, heads: dict[int, Any]) -> None:
    from fastbert.interpret.pages import as_json, write_html, write_png

    if out.suffix == ".json":
        files.write_text(out, as_json(found))
    else:
        (write_html if out.suffix == ".html" else write_png)(found, out, heads)
    say(f"written to {out}")
