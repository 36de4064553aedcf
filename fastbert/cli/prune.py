"""`fastbert prune`: a model folder that is so many times as fast, which the other commands read as any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fastbert.cli.quantize import copy_files
from fastbert.cli.settings import ready, say
from fastbert.files import RECORDS, existing, folder_or_new
from fastbert.finetune.config import trained_model
from fastbert.models.config import BertConfig
from fastbert.models.config_json import LAYER_SIZES


def prune(
    model: Annotated[
        Path, typer.Argument(help="OUT of a fine-tuning run, or a model folder; it is not changed")
    ],
    data: Annotated[
        Path, typer.Argument(help="labelled examples, as in training: .csv, .tsv, .jsonl, ...")
    ],
    out: Annotated[Path, typer.Argument(help="folder to write, a new one")],
    speedup: Annotated[float, typer.Option(help="times as fast as the model is now")] = 2.0,
    batch_size: Annotated[int, typer.Option(help="sequences in a batch that is timed")] = 32,
    examples: Annotated[int, typer.Option(help="examples that are read at most")] = 2048,
    padded: Annotated[
        bool,
        typer.Option(
            "--padded", help="fill up with zeros: transformers loads it, nothing is gained"
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
) -> None:
    """Write a copy of a fine-tuned model without the attention heads and feed-forward columns that it needs least.

    Times are measured on this machine, on the data's lengths. predict reads the copy as any other folder; finetune
    trains it further. transformers has no field for layers of different sizes, and reads it only with --padded.
    OUT/pruned.png shows what was kept of every layer.

    Example: fastbert prune runs/a train.csv out/ --speedup 2.0
    """
    if not 1.0 < speedup < math.inf:
        raise ValueError(f"--speedup {speedup:g}: pass a number above 1, such as 2.0")
    folder = trained_model(model)
    existing(data, RECORDS)
    folder_or_new(out, "name a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is a folder with files: name a new one")
    config = BertConfig.from_file(folder)
    if reason := config.why_not_trained:
        raise ValueError(f"the model in {folder} {reason}")
    if any(getattr(config, name) for name in LAYER_SIZES):
        raise ValueError(
            f"the model in {folder} is pruned already: prune the dense model it was made from, with a greater --speedup"
        )
    ready()
    import fastbert
    from fastbert.compress.plot import plot_kept
    from fastbert.train.store import write_folder

    found = fastbert.prune(
        folder, data, speedup, batch_size=batch_size, examples=examples, quiet=quiet
    )

    def fill(new: Path) -> None:
        copy_files(folder, folder, [folder], new)
        found.model.save_pretrained(new, padded=padded)
        plot_kept(found, new / "pruned.png")

    write_folder(out, fill)
    typer.echo(str(found))
    say(f"written to {out}")
