"""A model's blocks at every size, and the models that are put together from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastbert.compress.importance import Statistics, order, refitted
from fastbert.compress.latency import sizes_of
from fastbert.compress.search import Floats
from fastbert.models.layer_sizes import take

# a cache holds the refitted last matrices of so many sizes per block, on average
_KEPT = 8


class Pieces:
    """The blocks of a dense model, their estimated losses by size, and models of any sizes without retraining."""

    def __init__(
        self,
        dense: Any,
        seen: Sequence[tuple[Statistics, Statistics]],
        done: Callable[[], None],  # called after each layer
    ) -> None:
        self.dense = dense
        config = dense.config
        self.heads, self.width = config.num_attention_heads, config.intermediate_size
        self.head_size = config.head_size
        # of a layer's attention and of its feed-forward
        self.sizes = [*range(self.heads + 1)], sizes_of(self.width)
        self._seen = seen
        self._orders = []
        for layer, pair in zip(dense.bert.layers, seen, strict=True):
            blocks = zip(_lasts(layer), pair, self.sizes, strict=True)
            self._orders.append([order(last.weight, block, sizes) for last, block, sizes in blocks])
            done()
        self._refitted = lru_cache(2 * _KEPT * len(seen))(self._refit)

    def losses(self) -> list[Floats]:
        """The estimated rise of the loss by the number of the size: of every attention, then of every feed-forward."""
        return [pair[kind].losses.numpy() for kind in (0, 1) for pair in self._orders]

    @torch.no_grad()
    def model(self, heads: Sequence[int], widths: Sequence[int]) -> Any:
        """The model of these sizes, in eval mode: what the loss needs most, with last matrices by least squares."""
        pairs = [*zip(heads, widths, strict=True)]
        kept = [
            [self._kept(i, kind, pair[kind]) for kind in (0, 1)] for i, pair in enumerate(pairs)
        ]
        found = smaller(self.dense, *zip(*kept, strict=True))
        for i, (layer, pair) in enumerate(zip(found.bert.layers, pairs, strict=True)):
            for kind, last in enumerate(_lasts(layer)):
                weight, bias = self._refitted(i, kind, pair[kind])
                last.weight.copy_(weight)
                last.bias.copy_(bias)
        return found

    def _kept(self, layer: int, kind: int, size: int) -> Tensor:
        taken = self._orders[layer][kind].taken
        return taken[len(taken) - size :].sort().values

    def _refit(self, layer: int, kind: int, size: int) -> tuple[Tensor, Tensor]:
        last = _lasts(self.dense.bert.layers[layer])[kind]
        if size == self.sizes[kind][-1]:
            return last.weight, last.bias
        kept = self._kept(layer, kind, size)
        if kind == 0:
            kept = (
                kept[:, None] * self.head_size + torch.arange(self.head_size).to(kept)
            ).flatten()
        return refitted(last.weight, last.bias, self._seen[layer][kind].inputs, kept)


def _lasts(layer: Any) -> tuple[Any, Any]:
    """The last matrices of a layer's blocks."""
    return layer.attention.out, layer.feed_forward.down


def smaller(dense: Any, heads: Sequence[Tensor], columns: Sequence[Tensor]) -> Any:
    """The model with these heads and columns alone, in eval mode; it shares no weights."""
    whole = dense.state_dict()
    state, config = take(whole, heads, columns, dense.config)
    state = {key: value.clone() if value is whole[key] else value for key, value in state.items()}
    # without memory, so that no random weights are drawn
    with torch.device("meta"):
        found = type(dense)(config)
    found.load_state_dict(state, assign=True)
    return found.eval()
