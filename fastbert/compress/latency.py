"""How long the parts of a layer take on this machine, by the number of heads and by the feed-forward width.

The search for sizes reads times from this table and counts no parameters: halving a block rarely halves its time.
(Kurtic et al., ZipLM: inference-aware structured pruning of language models, 2023.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbert.compress.correct import Seen
from fastbert.integrations.report import medians
from fastbert.models.encoder import BertModel
from fastbert.models.inputs import prepare
from fastbert.runners.freeze import freeze

Floats = NDArray[np.float64]

# labels would have the loss computed, which inference does not
_LABELS = ("labels", "label_rows", "next_sentence_label", "start_positions", "end_positions")
# widths at which a feed-forward is timed; the time of a width between two of them is interpolated
_WIDTHS = 8


@dataclass(frozen=True)
class Part:
    """Seconds of one block at 0, 1, ... heads, or at each of `sizes` columns; what it takes without any is left out."""

    sizes: list[int]
    seconds: Floats


@dataclass(frozen=True)
class Table:
    """The time of a model: `fixed` without any heads and columns, and more for the blocks of every layer."""

    fixed: float
    heads: list[Part]
    columns: list[Part]

    def of(self, heads: Sequence[int], columns: Sequence[int]) -> float:
        """The seconds of a model with these heads and feed-forward columns in its layers."""
        pairs = (*zip(self.heads, heads, strict=True), *zip(self.columns, columns, strict=True))
        found = (part.seconds[part.sizes.index(size)] for part, size in pairs)
        return self.fixed + float(sum(found))

    def scaled(self, factor: float) -> Table:
        """The table with the blocks' times multiplied by a factor."""
        heads, columns = (
            [Part(p.sizes, p.seconds * factor) for p in parts]
            for parts in (self.heads, self.columns)
        )
        return Table(self.fixed, heads, columns)


def sizes_of(width: int) -> list[int]:
    """The feed-forward widths to choose from: 0, and multiples of 32 up to `width`, of fewer in a narrow model."""
    step = 1
    while step < 32 and step * 64 <= width:
        step *= 2
    return [*range(0, width, step), width]


def inference(model: Any, batches: Sequence[Mapping[str, Any]]) -> Callable[[], None]:
    """A call that runs a model on all batches without their labels."""
    bare = [{k: v for k, v in batch.items() if k not in _LABELS} for batch in batches]

    @torch.no_grad()
    def call() -> None:
        for batch in bare:
            model(**batch)

    return call


def speedup(
    dense: Any, small: Any, batches: Sequence[Mapping[str, Any]], seconds: float = 6.0
) -> float:
    """How many times as fast the second model is, both in the form of `freeze`, called in turns."""
    calls = [inference(freeze(m), batches) for m in (dense, small)]
    first, second = _timed(calls, seconds)
    return float(first / second)


def measure(
    dense: Any,
    empty: Any,
    batches: Sequence[Mapping[str, Any]],
    done: Callable[[], None],
    seconds: float = 12.0,
) -> Table:
    """Measure a table for a model on these batches; `empty` is the model without any heads and columns.

    A block is timed in an encoder of one layer, by the difference to a layer without blocks. The last layer has times
    of its own where its head reads some tokens only. All times are multiplied by one factor so that they add up to the
    whole model's.
    """
    seen = layer_inputs(dense, batches)
    narrow = any(s.rows is not None for s in seen)
    config = dense.config
    H, widths = config.num_attention_heads, sizes_of(config.intermediate_size)
    step = math.ceil((len(widths) - 1) / _WIDTHS)
    timed = [*widths[:-1:step], widths[-1]]
    sizes = [(0, 0), *((h, 0) for h in range(1, H + 1)), *((0, w) for w in timed[1:])]
    encoders = [_encoder(dense, *size) for size in sizes]
    found = []
    for last in (False, True) if narrow else (False,):
        calls = [partial(_encode, encoder, seen, last) for encoder in encoders]
        found.append(_timed(calls, seconds / (2 if narrow else 1)))
        done()
    whole, fixed = _timed([inference(freeze(m), batches) for m in (dense, empty)], seconds / 4)
    done()
    parts = []
    for times in found:
        # no block gets faster by growing
        more = np.maximum(times - times[0], 0.0)
        by_heads = np.maximum.accumulate(more[: H + 1])
        by_width = np.maximum.accumulate(np.append(0.0, more[H + 1 :]))
        columns = np.interp(widths, timed, by_width)
        parts.append((Part([*range(H + 1)], by_heads), Part(widths, columns)))
    layers = [parts[0]] * (config.num_hidden_layers - 1) + [parts[-1]]
    table = Table(fixed, [p for p, _ in layers], [p for _, p in layers])
    full = table.of([H] * len(layers), [widths[-1]] * len(layers))
    return table.scaled((whole - fixed) / max(full - fixed, 1e-12))


def _timed(calls: Sequence[Callable[[], object]], seconds: float) -> Floats:
    """The median seconds of each call, in as many rounds as fit into `seconds`, at least 3 and at most 50."""
    works = [(lambda: None, call) for call in calls]
    one = sum(medians(works, 1))
    return np.array(medians(works, min(max(int(seconds / max(one, 1e-9)), 3), 50)))


def layer_inputs(model: Any, batches: Sequence[Mapping[str, Any]]) -> list[Seen]:
    """What the layers of a model see of each batch."""
    first: list[Any] = []
    last: list[Any] = []
    layers = model.bert.layers
    handles = [
        layers[0].register_forward_pre_hook(lambda _, a: first.append(a)),
        layers[-1].register_forward_pre_hook(lambda _, a: last.append(a[5])),
    ]
    try:
        inference(model, batches)()
    finally:
        for handle in handles:
            handle.remove()
    return [
        Seen(x, cu_seqlens, max_seqlen, rows)
        for (x, cu_seqlens, max_seqlen, *_), rows in zip(first, last, strict=True)
    ]


def _encoder(dense: Any, heads: int, width: int) -> Any:
    """An encoder of one layer with random weights; its embeddings take vectors."""
    c = dense.config
    config = dataclasses.replace(
        c,
        vocab_size=(c.pad_token_id or 0) + 1,
        num_hidden_layers=1,
        layer_heads=(heads,),
        layer_widths=(width,),
    )
    encoder = BertModel(config, add_pooler=False).to(dense.device, dense.dtype)
    return freeze(encoder)


@torch.no_grad()
def _encode(encoder: Any, seen: Sequence[Seen], last: bool) -> None:
    for s in seen:
        inputs = prepare(
            encoder.config, inputs_embeds=s.x, cu_seqlens=s.cu_seqlens, max_seqlen=s.max_seqlen
        )
        encoder.encode(inputs, s.rows if last else None)
