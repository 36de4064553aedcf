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
from fastbert.compress.importance import (
    Gradients,
    labels_in,
    least_needed,
    losses_by_size,
    mask_gradients,
)
from fastbert.compress.latency import Table, layer_inputs, measure, sizes_of
from fastbert.compress.latency import speedup as measured_speedup
from fastbert.compress.progress import Bar
from fastbert.compress.search import cheapest
from fastbert.files import quoted
from fastbert.finetune.features import Shuffled
from fastbert.finetune.judge import Part
from fastbert.finetune.predict import Predictor
from fastbert.models.encoder import Pretrained
from fastbert.models.layer_sizes import full_size, take
from fastbert.runners.freeze import unfreeze
from fastbert.runners.frozen import why_not_read
from fastbert.runners.replace import is_replaced

# tokens of examples that are read at most
_TOKENS = 30_000
# batches that are timed
_TIMED = 4
# a measured speed-up may be off by so much before sizes are searched again, and so many times
_CLOSE, _SEARCHES = 0.05, 3
# least shares of a layer's heads and columns to keep, each tried. Fisher information holds near the dense model, and is
# far too low for the heads of several layers in a row
_LEAST = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.25, 0.125), (0.5, 0.25))
# batches that the tries are judged on
_JUDGED = 4


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
    dicts, of which `examples` are read in batches of `batch_size`. Nothing is retrained. How much the loss needs a head
    or a column is its Fisher information; the sizes follow from it and from times that are measured here, on the data's
    lengths and with `freeze`; what is left is corrected by least squares. (Kwon et al. 2022; Kurtic et al., ZipLM,
    2023.) The layers have sizes of their own afterwards (BertConfig.layer_heads, layer_widths).

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
    dense = _copy(model)
    with Bar(len(batches) + 3 + _SEARCHES + len(dense.bert.layers), quiet) as bar:
        bar.begin("gradients of masks")
        gradients = mask_gradients(dense, batches, bar.advance)
        timed = batches[:_TIMED]
        bar.begin("times on this machine")
        layers = len(gradients)
        none = [torch.empty(0, dtype=torch.int64)] * layers
        table = measure(dense, _smaller(dense, none, none), timed, bar.advance)
        bar.begin("search for sizes")
        search = _Search(dense, gradients, table, batches, speedup)
        found = search.run(bar)
        bar.begin("correction")
        # the trial has left copies of weights that are changed now
        unfreeze(found.model)
        correct(dense, found.model, layer_inputs(unfreeze(dense), batches), bar.advance)
    return dataclasses.replace(found, dense_loss=search.loss(dense), loss=search.loss(found.model))


class _Search:
    """The choice of sizes, and its trial on the machine."""

    def __init__(
        self,
        dense: Any,
        gradients: Sequence[Gradients],
        table: Table,
        batches: Sequence[Mapping[str, Any]],
        speedup: float,
    ) -> None:
        self.dense, self.table, self.speedup = dense, table, speedup
        self.timed, self.judged = batches[:_TIMED], batches[-_JUDGED:]
        config = dense.config
        self.heads, self.width = config.num_attention_heads, config.intermediate_size
        self.sizes = sizes_of(self.width)
        self.losses = {
            "heads": [losses_by_size(g.heads).tolist() for g in gradients],
            "widths": [losses_by_size(g.columns)[self.sizes].tolist() for g in gradients],
        }
        self.orders = [(least_needed(g.heads), least_needed(g.columns)) for g in gradients]
        layers = len(gradients)
        self.whole = table.of([self.heads] * layers, [self.width] * layers)

    def run(self, bar: Bar) -> Pruned:
        """Try sizes up to _SEARCHES times; returns the try whose measured speed-up is nearest to `speedup`."""
        table, best = self.table, None
        for _ in range(_SEARCHES):
            if (sizes := self._sizes(table)) is None:
                break
            found = self._trial(table, *sizes)
            bar.advance()
            if best is None or self._off(found) < self._off(best):
                best = found
            if self._off(found) <= _CLOSE:
                break
            blocks = self.whole / found.predicted - table.fixed
            actual = self.whole / found.measured - table.fixed
            if blocks <= 0 or actual <= 0:
                break
            table = table.scaled(actual / blocks)
        if best is None:
            most = self.whole / table.fixed
            raise ValueError(
                f"speedup is {self.speedup:g}, and without any heads and columns the model is {most:.2f} times as "
                "fast: ask for less, or start from a model with fewer layers"
            )
        return best

    def _off(self, found: Pruned) -> float:
        return abs(found.measured / self.speedup - 1)

    def _sizes(self, table: Table) -> tuple[list[int], list[int]] | None:
        """The heads and the width of every layer, None if none are fast enough.

        Of several choices, made with other least shares, the one whose uncorrected model has the least loss.
        """
        found = [sizes for least in _LEAST if (sizes := self._within(table, *least)) is not None]
        distinct = [sizes for i, sizes in enumerate(found) if sizes not in found[:i]]
        if len(distinct) < 2:
            return next(iter(distinct), None)
        return min(distinct, key=lambda sizes: self.loss(self._model(*sizes)))

    def _within(
        self, table: Table, least_heads: float, least_width: float
    ) -> tuple[list[int], list[int]] | None:
        """The sizes of the least estimated loss that keep these shares of every layer."""
        heads, widths = np.array(self.losses["heads"]), np.array(self.losses["widths"])
        heads[:, : math.ceil(least_heads * self.heads)] = np.inf
        widths[:, np.array(self.sizes) < least_width * self.width] = np.inf
        losses = [*heads, *widths]
        seconds = [part.seconds for part in (*table.heads, *table.columns)]
        chosen = cheapest(losses, seconds, self.whole / self.speedup - table.fixed)
        if chosen is None:
            return None
        layers = len(table.heads)
        return chosen[:layers], [self.sizes[i] for i in chosen[layers:]]

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """A model's loss on some batches."""
        terms = [labels_in(batch) for batch in self.judged]
        losses = [float(model(**batch).loss) for batch in self.judged]
        return sum(n * loss for n, loss in zip(terms, losses, strict=True)) / sum(terms)

    def _model(self, heads: list[int], widths: list[int]) -> Any:
        """The model with the heads and columns that the loss needs most."""
        kept = [
            [order[len(order) - size :].sort().values for order, size in pair]
            for pair in (
                ((by_head, h), (by_column, w))
                for (by_head, by_column), h, w in zip(self.orders, heads, widths, strict=True)
            )
        ]
        return _smaller(self.dense, *zip(*kept, strict=True))

    def _trial(self, table: Table, heads: list[int], widths: list[int]) -> Pruned:
        """A model of these sizes and its measured speed-up."""
        small = self._model(heads, widths)
        return Pruned(
            small,
            heads,
            widths,
            self.heads,
            self.width,
            self.speedup,
            self.whole / table.of(heads, widths),
            measured_speedup(self.dense, small, self.timed),
            table,
            self.losses,
        )


def _smaller(dense: Any, heads: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]) -> Any:
    """The model with these heads and columns alone, in eval mode."""
    state, config = take(dense.state_dict(), heads, columns, dense.config)
    small = type(dense)(config).to(dense.device, dense.dtype)
    small.load_state_dict(state)
    return small.eval()


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
