"""prune(): heads and feed-forward columns are taken out of a model until it is so many times as fast."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.compress.correct import correct
from fastbert.compress.importance import NO_LABELS, labels_in, statistics
from fastbert.compress.latency import Table, layer_inputs, measure
from fastbert.compress.latency import speedup as measured_speedup
from fastbert.compress.pieces import Pieces, smaller
from fastbert.compress.progress import Bar
from fastbert.compress.search import Search
from fastbert.files import quoted
from fastbert.finetune.features import Shuffled
from fastbert.finetune.judge import Part
from fastbert.finetune.predict import Predictor
from fastbert.models.encoder import Pretrained
from fastbert.models.layer_sizes import full_size
from fastbert.runners.freeze import unfreeze
from fastbert.runners.frozen import why_not_read
from fastbert.runners.replace import is_replaced

# tokens of examples that are read at most
_TOKENS = 30_000
# batches that are timed
_TIMED = 4
# a measured speed-up may be off by _CLOSE; sizes are searched again, at most so many times, if it is off by _NEAR
_CLOSE, _NEAR, _TRIALS = 0.05, 0.02, 3
# the first search for sizes judges at most so many choices by their loss, in about so many seconds; later searches get
# a quarter of both
_TRIES, _SECONDS = 60, 30.0
# factors of the blocks' estimates that choices begin with, as powers: 0 leaves them as they are, and with 1 no block
# matters more than another
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# batches that choices are judged on
_JUDGED = 6


@dataclass(frozen=True)
class Pruned:
    """A pruned model, in eval mode, and what was found on the way."""

    model: Any
    # heads and feed-forward width of every layer, and those of the dense model
    heads: list[int]
    widths: list[int]
    dense_heads: int
    dense_width: int
    # times as fast as the dense model: as asked for, by the table of latencies, and as measured in the end
    asked: float
    predicted: float
    measured: float
    # seconds by size, and the estimated rise of the loss by size: {"heads", "widths"}, a list a layer
    table: Table
    losses: dict[str, list[list[float]]]
    # the loss of the dense and of the pruned model on the last batches of the data
    dense_loss: float = math.nan
    loss: float = math.nan

    def __str__(self) -> str:
        lines = [f"{'layer':<6} {'heads':>12} {'width':>14}"]
        for i, (heads, width) in enumerate(zip(self.heads, self.widths, strict=True)):
            kept = f"{heads} of {self.dense_heads}", f"{width} of {self.dense_width}"
            lines.append(f"{i:<6} {kept[0]:>12} {kept[1]:>14}")
        dense = self.dense_heads * len(self.heads), self.dense_width * len(self.widths)
        kept = f"{sum(self.heads)} of {dense[0]}", f"{sum(self.widths)} of {dense[1]}"
        lines.append(f"{'all':<6} {kept[0]:>12} {kept[1]:>14}")
        lines.append(
            f"{self.measured:.2f} times as fast as the dense model (asked for {self.asked:g}, predicted "
            f"{self.predicted:.2f})"
        )
        lines.append(f"loss {self.loss:.4f} on a part of the data, {self.dense_loss:.4f} before")
        return "\n".join(lines)


def prune(
    model: Any,
    data: Any,
    speedup: float = 2.0,
    *,
    batch_size: int = 32,
    examples: int = 2048,
    seed: int = 0,
    quiet: bool = False,
) -> Pruned:
    """Take heads and feed-forward columns out of a fine-tuned model until inference is `speedup` times as fast.

    `model` is a model of fastbert.bert, which is not changed, and `data` an iterable of its batches with labels; or
    `model` is a folder, such as OUT of a run of finetune, and `data` labelled examples: a file, a data set or a list of
    dicts, of which `examples` are read in batches of `batch_size`. Nothing is retrained. What is left of a block is
    changed by least squares to make up for the rest, and the rise of the loss is estimated for every size. The sizes
    follow from that and from times that are measured here, on the data's lengths and with `freeze`; many choices are
    judged by their actual loss, in an order that `seed` gives. (Kurtic et al., ZipLM, 2023; Frantar & Alistarh, SPDY,
    2022.) The layers have sizes of their own afterwards (BertConfig.layer_heads, layer_widths).

    Raises TypeError for other models; ValueError for a speed-up of at most 1 or one that no sizes reach, for a model
    that is pruned or int8 already, and for data without labels.
    """
    if isinstance(speedup, bool) or not isinstance(speedup, (int, float)):
        raise TypeError(f"speedup is {quoted(speedup)}: pass a number above 1, such as 2.0")
    if not 1.0 < speedup < math.inf:
        raise ValueError(f"speedup is {speedup:g}: pass a number above 1, such as 2.0")
    if isinstance(model, (str, Path)):
        model, batches = _from_files(model, data, batch_size, examples, seed)
    else:
        batches = _batches(data)
    # a mean over no labels is no number
    if not (batches := [batch for batch in batches if labels_in(batch)]):
        raise ValueError(NO_LABELS)
    dense = _copy(model)
    layers = len(dense.bert.layers)
    with Bar(len(batches) + 3 + 2 * layers + _TRIALS, quiet) as bar:
        bar.begin("what the loss needs")
        seen = statistics(dense, batches, bar.advance)
        bar.begin("times on this machine")
        none = [torch.empty(0, dtype=torch.int64)] * layers
        table = measure(dense, smaller(dense, none, none), batches[:_TIMED], bar.advance)
        bar.begin("search for sizes")
        pieces = Pieces(dense, seen, bar.advance)
        trials = _Trials(pieces, table, batches, speedup, seed)
        found = trials.run(bar)
        bar.begin("correction")
        # the trial has left copies of weights that are changed now
        unfreeze(found.model)
        correct(dense, found.model, layer_inputs(unfreeze(dense), batches), bar.advance)
    return dataclasses.replace(found, dense_loss=trials.loss(dense), loss=trials.loss(found.model))


class _Trials:
    """The choice of sizes, and its trials on the machine."""

    def __init__(
        self,
        pieces: Pieces,
        table: Table,
        batches: Sequence[Mapping[str, Any]],
        speedup: float,
        seed: int,
    ) -> None:
        self.pieces, self.table, self.speedup = pieces, table, speedup
        self.timed, self.judged = batches[:_TIMED], batches[-_JUDGED:]
        self.layers = len(table.heads)
        self.whole = table.of([pieces.heads] * self.layers, [pieces.width] * self.layers)
        losses = pieces.losses()
        without = np.array([max(of_sizes[0], 1e-30) for of_sizes in losses])
        starts = [without**-power for power in _POWERS]
        self._search = Search(losses, starts, self._loss_of, seed)

    def run(self, bar: Bar) -> Pruned:
        """Try sizes up to _TRIALS times; returns the trial with the least loss among those near `speedup`.

        Where none is within _CLOSE of it, the nearest.
        """
        table, found = self.table, list[Pruned]()
        tries, limit = _TRIES, _SECONDS
        for _ in range(_TRIALS):
            trial = self._trial(table, tries, limit)
            bar.advance()
            if trial is None:
                break
            found.append(trial)
            blocks = self.whole / trial.predicted - table.fixed
            actual = self.whole / trial.measured - table.fixed
            if self._off(trial) <= _NEAR or blocks <= 0 or actual <= 0:
                break
            table = table.scaled(actual / blocks)
            tries, limit = _TRIES // 4, _SECONDS / 4
        if not found:
            most = self.whole / self.table.fixed
            raise ValueError(
                f"speedup is {self.speedup:g}, and without any heads and columns the model is {most:.2f} times as "
                "fast: ask for less, or start from a model with fewer layers"
            )
        return min(found, key=lambda t: (max(self._off(t), _CLOSE), t.loss))

    def _off(self, trial: Pruned) -> float:
        return abs(trial.measured / self.speedup - 1)

    def _trial(self, table: Table, tries: int, limit: float) -> Pruned | None:
        """A model within a table's times and its measured speed-up; None if no sizes are fast enough."""
        seconds = [part.seconds for part in (*table.heads, *table.columns)]
        budget = self.whole / self.speedup - table.fixed
        if (best := self._search.run(seconds, budget, tries, limit)) is None:
            return None
        loss, numbers = best
        heads, widths = self._sizes(numbers)
        small = self.pieces.model(heads, widths)
        losses = [found.tolist() for found in self._search.estimates]
        return Pruned(
            small,
            heads,
            widths,
            self.pieces.heads,
            self.pieces.width,
            self.speedup,
            self.whole / table.of(heads, widths),
            measured_speedup(self.pieces.dense, small, self.timed),
            table,
            {"heads": losses[: self.layers], "widths": losses[self.layers :]},
            loss=loss,
        )

    def _sizes(self, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """The heads and widths with these numbers."""
        heads, widths = self.pieces.sizes
        return (
            [heads[i] for i in numbers[: self.layers]],
            [widths[i] for i in numbers[self.layers :]],
        )

    def _loss_of(self, numbers: Sequence[int]) -> float:
        return self.loss(self.pieces.model(*self._sizes(numbers)))

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """A model's loss on some batches."""
        terms = [labels_in(batch) for batch in self.judged]
        losses = [float(model(**batch).loss) for batch in self.judged]
        return sum(n * loss for n, loss in zip(terms, losses, strict=True)) / sum(terms)


def _copy(model: Any) -> Any:
    """A copy in eval mode without gradients; raises TypeError or ValueError for a model that can't be pruned."""
    if not isinstance(model, Pretrained):
        raise TypeError(
            f"{type(model).__name__} is no model of fastbert.bert: load it with fastbert.bert, or pass its folder"
        )
    if is_replaced(model):
        raise ValueError("the model's weights are int8: prune the model before it was quantised")
    if model.config != full_size(model.config):
        raise ValueError(
            "the model is pruned already: prune the dense model it was made from, with a greater speedup"
        )
    form = model.config
    if form.pre_norm or form.gated or form.rotary or not form.biases:
        raise ValueError(
            "the model's layers have ModernBERT's form or a part of it: prune takes those of BERT's own form"
        )
    if not len(model.bert.layers):
        raise ValueError("the model has no layers: there is nothing to take out")
    found: Any = unfreeze(copy.deepcopy(model).eval()).requires_grad_(False)
    for layer in found.bert.layers:
        if reason := why_not_read(layer):
            raise ValueError(f"the layers can't be pruned: {reason}")
    return found


def _batches(data: Any) -> list[Mapping[str, Any]]:
    """The batches in memory."""
    found = [] if isinstance(data, (str, Path, Mapping)) else _listed(data)
    if not found or not all(isinstance(batch, Mapping) for batch in found):
        raise TypeError(
            f"data is {quoted(type(data).__name__)}: pass a list of batches, each with the forward's arguments by name"
        )
    return found


def _listed(data: Any) -> list[Any]:
    return [*data] if isinstance(data, Iterable) else []


def _from_files(
    folder: str | Path, data: Any, batch_size: int, examples: int, seed: int
) -> tuple[Any, list[Mapping[str, Any]]]:
    """The model in a folder, and batches of some of the labelled examples, as many as fit into _TOKENS tokens."""
    if examples < 1:
        raise ValueError(f"examples is {examples}: it must be at least 1")
    predictor = Predictor(folder, batch_size)
    labelled = predictor.labelled(data)
    part = Part.of(labelled, predictor.task, predictor.tokenizer, predictor.model.config)
    shuffled = Shuffled(part.features, batch_size, seed)
    batches: list[Mapping[str, Any]] = []
    tokens = 0
    for number in range(min(len(shuffled), -(-examples // batch_size))):
        batches.append(shuffled.batch(0, number))
        tokens += len(batches[-1]["input_ids"])
        if tokens >= _TOKENS:
            break
    return predictor.model, batches
