"""`fastbert tune`: the fastest backend of every op, measured on this machine with a model's shapes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.cli.settings import ready
from fastbert.models.config import BertConfig, model_folder

DTYPES = ("fp32", "bf16", "fp16")


def tune(
    model: Annotated[
        Path | None, typer.Option(help="model folder whose shapes count; default BERT-base's")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="sequences in a batch", min=1)] = 8,
    length: Annotated[int, typer.Option(help="tokens of the longest sequence", min=2)] = 128,
    layers: Annotated[int, typer.Option(help="layers to run: all have one shape", min=1)] = 2,
    dtype: Annotated[str, typer.Option(help=f"one of {', '.join(DTYPES)}")] = "fp32",
    inference: Annotated[
        bool, typer.Option("--inference", help="time the forward alone, without dropout")
    ] = False,
    rounds: Annotated[int, typer.Option(help="timed calls of each backend", min=1)] = 5,
    configurations: Annotated[
        bool,
        typer.Option(help="on a GPU, compare Triton's launch configurations too: minutes"),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time every backend on this machine, and Triton's launch configurations, and use the fastest from now on.

    The winners are kept in tuned.json of $FASTBERT_CACHE or ~/.cache/fastbert; delete it to go back. Scripts with
    models of their own call fastbert.tune(step). Example: fastbert tune --batch-size 32 --length 128 --dtype bf16
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    config = BertConfig() if model is None else BertConfig.from_file(model_folder(model))
    if length > config.max_position_embeddings:
        raise ValueError(
            f"--length {length} is more than the model's {config.max_position_embeddings} positions"
        )
    config = dataclasses.replace(
        config, num_hidden_layers=layers, int8_bits=None, int8_embeddings=False
    )
    ready()
    from fastbert.backend import tuned
    from fastbert.tuning.measure import tune as measure

    results = measure(
        _step(config, batch_size, length, dtype, inference),
        rounds=rounds,
        configurations=configurations,
    )
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    for op, classes in results.items():
        for name, microseconds in classes.items():
            fastest = min(microseconds, key=lambda b: microseconds[b])
            others = "; ".join(f"{b}: {us:.0f} us" for b, us in microseconds.items())
            typer.echo(f"{op:<24} {name:<36} {fastest:<8} ({others})")
    typer.echo(f"stored in {tuned.path()}")


def _step(config: BertConfig, batch: int, length: int, dtype: str, inference: bool) -> Any:
    """A call that pretrains on, or encodes, a random batch whose lengths fall from `length` to half of it."""
    import torch

    from fastbert.models.heads import BertForPreTraining

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BertForPreTraining(config).to(device)
    low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    ids = torch.randint(config.vocab_size, (batch, length), device=device)
    lengths = torch.linspace(length, max(1, length // 2), batch, device=device).long()
    mask = (torch.arange(length, device=device) < lengths[:, None]).long()
    labelled = (torch.rand(ids.shape, device=device) < 0.15) & (mask == 1)
    labels = torch.where(labelled, ids, -100)
    pairs = torch.zeros(batch, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(device, low, enabled=low is not None):
            if inference:
                with torch.no_grad():
                    model.eval()(ids, attention_mask=mask)
            else:
                model(
                    ids, attention_mask=mask, labels=labels, next_sentence_label=pairs
                ).loss.backward()

    return step
