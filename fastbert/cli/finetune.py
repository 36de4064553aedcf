"""`fastbert finetune`, whose flags are the fields of FinetuneConfig, and `fastbert predict`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert import files
from fastbert.cli.settings import configured, ready, say, signature
from fastbert.cli.text import Int8, read_lines
from fastbert.files import RECORDS, existing, quoted
from fastbert.finetune.config import FinetuneConfig, trained_model
from fastbert.models.config import BertConfig

FORMATS = (".jsonl", ".csv", ".conll")


def finetune(**flags: Any) -> None:
    """Fine-tune a model on labelled data: classes of texts, tags of words, or answers to questions.

    Settings come from flags, or from a --config file (lines such as `lr = 5e-5`, the flags' names with _ for -);
    flags win. OUT then holds model/, of the best evaluation, which transformers loads as well, config.toml,
    metrics.jsonl, checkpoints/, result.json, curves.png and confusion.png. SIGTERM and Ctrl-C end a run after a
    checkpoint; --resume goes on from the last one, with the same losses as without the interruption.

    Example: fastbert finetune train.csv --task classify --model bert/ --out runs/a
    """
    out, resume, quiet = (flags.pop(name) for name in ("out", "resume", "quiet"))
    config = configured(FinetuneConfig, out, resume, flags, FinetuneConfig.check_readable)
    ready()
    from fastbert.finetune import run

    result = run.finetune(config, out, resume=resume, quiet=quiet, say=None if quiet else say)
    for line in run.summary(result):
        typer.echo(line)


finetune.__signature__ = signature(FinetuneConfig)  # type: ignore[attr-defined]


def predict(
    model: Annotated[Path, typer.Argument(help="OUT of a fine-tuning run, or a model folder")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="texts, or questions; without any, lines of standard input"),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help=".csv, .tsv, .jsonl, .json or CoNLL file, columns as in training"),
    ] = None,
    pair: Annotated[str | None, typer.Option(help="the second text of every pair")] = None,
    context: Annotated[
        str | None, typer.Option(help="the text that questions are answered from")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=".jsonl, .csv or .conll (tags); default JSON lines printed")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="sequences at once")] = 32,
    int8: Int8 = False,
) -> None:
    """Print a fine-tuned model's predictions, a line of JSON per text or record, in their order.

    Where all records of --file have labels, the metrics of the predictions are printed too, to standard error.

    Example: fastbert predict runs/a "A splendid film."
    """
    if out is not None and out.suffix not in FORMATS:
        raise ValueError(
            f"--out {out} ends in {quoted(out.suffix)}: choose one of {', '.join(FORMATS)}"
        )
    if file is not None and (texts or pair or context):
        raise ValueError("texts and --file are both given: pass one of them")
    BertConfig.from_file(trained_model(model))
    if file is not None:
        existing(file, RECORDS)
    ready()
    from fastbert.finetune.predict import Predictor

    predictor = Predictor(model, batch_size, int8)
    if out is not None and out.suffix == ".conll" and predictor.options.task != "tag":
        raise ValueError(
            f"--out {out} is for tags, which {model} does not give: choose .jsonl or .csv"
        )
    metrics: dict[str, float] = {}
    if file is not None:
        predictions, metrics = predictor.records(file)
    else:
        lines = read_lines(texts)
        seconds, contexts = ([v] * len(lines) if v is not None else None for v in (pair, context))
        predictions = predictor.texts(lines, seconds, contexts)
    if predictor.cut:
        say(f"{predictor.cut} texts were cut to {predictor.options.max_length} tokens")
    if metrics:
        say("  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if "_" not in k))
    if out is None:
        typer.echo(encoded(".jsonl", predictions), nl=False)
        return
    files.write_text(out, encoded(out.suffix, predictions))
    say(f"{len(predictions)} predictions written to {out}")


def encoded(suffix: str, predictions: list[dict[str, Any]]) -> str:
    """The content of a file of predictions."""
    if suffix == ".jsonl":
        return files.json_lines(predictions)
    if suffix == ".conll":
        from fastbert.finetune import conll

        return conll.encoded([(p["words"], p["tags"]) for p in predictions])
    if any("\0" in v for p in predictions for v in p.values() if isinstance(v, str)):
        raise ValueError("a .csv file can't hold the zero character of these texts: choose .jsonl")
    text = io.StringIO(newline="")
    columns = dict.fromkeys(name for p in predictions for name in p)
    table = csv.DictWriter(text, list(columns), restval="")
    table.writeheader()
    for p in predictions:
        # lists and dicts as JSON
        table.writerow(
            {
                k: v if isinstance(v, (str, int, float)) else json.dumps(v, ensure_ascii=False)
                for k, v in p.items()
            }
        )
    return text.getvalue()
