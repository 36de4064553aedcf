"""How much the loss needs each head and each feed-forward column: Fisher information of masks.

A mask m multiplies the inputs of a block's last matrix, one number per head or column; it is all ones. With g_n the
gradient of example n's loss by m, the mean of g_n g_n^T is the empirical Fisher information, and taking out a set R
raises the loss by about 1/2 mean_n (sum_{i in R} g_ni)^2. (Kwon et al., A fast post-training pruning framework for
transformers, 2022; Michel et al., Are sixteen heads really better than one?, 2019, for masks of heads.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Gradients(NamedTuple):
    """Gradients of the loss by a layer's masks, a row for each of N examples."""

    heads: Tensor  # (N, H) fp32
    columns: Tensor  # (N, F) fp32


def mask_gradients(
    model: Any, batches: Sequence[Mapping[str, Any]], done: Callable[[], None]
) -> list[Gradients]:
    """The gradients of every layer's masks on labelled batches; `done` is called after each batch.

    The model is in eval mode. No weight gets a gradient: all but one of its parameters must not require any. Raises
    ValueError for batches without labels.
    """
    # some parameter before the first block must require a gradient for the blocks to get one
    source = model.bert.embeddings.norm.bias
    source.requires_grad_(True)
    with _watched(model.bert.layers) as watches:
        for batch in batches:
            loss = model(**batch).loss
            if loss is None:
                raise ValueError(
                    "the data has no labels: pass labelled examples, the loss says which heads are needed"
                )
            torch.autograd.grad(loss * labels_in(batch), source)
            done()
        found = [Gradients(*(torch.cat(w.rows[name]) for name in w.rows)) for w in watches]
    source.requires_grad_(False)
    return found


def labels_in(batch: Mapping[str, Any]) -> int:
    """The number of terms in the mean that is the batch's loss."""
    labels = batch.get("labels", batch.get("start_positions"))
    return max(int((labels != -100).sum()), 1) if isinstance(labels, Tensor) else 1


class _Watch:
    """Sees the inputs of the last matrices of one layer's blocks, and their gradients."""

    def __init__(self, layer: Any) -> None:
        self.heads = layer.attention.qkv.num_heads
        self.rows: dict[str, list[Tensor]] = {"heads": [], "columns": []}
        self._examples = torch.empty(0)
        self._count = 0
        self.handles = [
            layer.register_forward_pre_hook(self._begin),
            layer.attention.out.register_forward_pre_hook(partial(self._seen, "heads")),
            layer.feed_forward.down.register_forward_pre_hook(partial(self._seen, "columns")),
        ]

    def _begin(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, cu_seqlens, *_, rows = arguments
        rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows
        # rows past the last sequence are of a further example, which is left out
        ends = cu_seqlens[1:].to(rows.dtype)
        self._count = ends.shape[0]
        self._examples = torch.searchsorted(ends, rows, right=True)

    def _seen(self, name: str, m: nn.Module, arguments: tuple[Any, ...]) -> None:
        (x,) = arguments
        x.register_hook(partial(self._collect, name, x.detach(), self._examples, self._count))

    def _collect(self, name: str, x: Tensor, examples: Tensor, count: int, dx: Tensor) -> None:
        found = (x * dx).float()  # (R, H D) or (R, F)
        if name == "heads":
            found = found.unflatten(1, (self.heads, -1)).sum(2)
        sums = found.new_zeros(count + 1, found.shape[1]).index_add_(0, examples, found)
        self.rows[name].append(sums[:count].cpu())


@contextmanager
def _watched(layers: Any) -> Iterator[list[_Watch]]:
    watches = [_Watch(layer) for layer in layers]
    try:
        yield watches
    finally:
        for watch in watches:
            for handle in watch.handles:
                handle.remove()


def least_needed(gradients: Tensor) -> Tensor:
    """The numbers of a block's heads or columns in the order in which they are taken out, (n,) int64.

    Greedy: next is the one that raises 1/2 mean_n (sum of g_ni over all that are out)^2 least, so that several with the
    same effect on the loss are not all taken out. The diagonal of the Fisher information would count each by itself.
    """
    products = (gradients.T @ gradients).double()  # (n, n)
    cost = products.diagonal().clone()
    order: list[int] = []
    for _ in range(products.shape[0]):
        chosen = int(cost.argmin())
        order.append(chosen)
        cost += 2 * products[chosen]
        cost[chosen] = torch.inf
    return torch.tensor(order, dtype=torch.int64)


def losses_by_size(gradients: Tensor) -> Tensor:
    """The rise of the loss with 0, 1, ..., n of the heads or columns kept, (n + 1,) fp64, by the diagonal alone."""
    single = gradients.double().square().mean(0) / 2
    rising = single.sort().values.cumsum(0)
    return torch.cat([rising.new_zeros(1), rising]).flip(0)
