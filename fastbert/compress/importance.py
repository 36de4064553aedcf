"""How much the loss needs the heads and the feed-forward columns of each block, and in which order they are taken out.

A block ends in y = W h + b, with a head's or a column's numbers in h. Without some of them, and with W and b changed
for what is left, y differs by E [h, 1]. With g the gradient of an example's loss by y, the loss rises by about
1/2 tr(G E H E^T), where H is the mean of [h, 1] [h, 1]^T over tokens, and G the sum of g g^T over tokens, divided by
the number of labels. The least rise over all such changes has a closed form: the optimal brain surgeon. (Hassibi &
Stork 1992; Kurtic et al., ZipLM, 2023, for columns and heads of a transformer.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

# what is added to H's diagonal, in units of its mean
RIDGE = 1e-2

NO_LABELS = "the data has no labels: pass labelled examples, the loss says which heads are needed"


class Statistics(NamedTuple):
    """What a block's last matrix sees of the data."""

    inputs: Tensor  # (K + 1, K + 1) fp32, H
    gradients: Tensor  # (C, C) fp32, G


class Order(NamedTuple):
    """The heads or columns of a block in the order in which they are taken out, and what that costs."""

    taken: Tensor  # (n,) int64
    losses: (
        Tensor  # fp64, the rise of the loss with each size that is left, by the number of the size
    )


def statistics(
    model: Any, batches: Sequence[Mapping[str, Any]], done: Callable[[], None]
) -> list[tuple[Statistics, Statistics]]:
    """Of every layer's attention and feed-forward on labelled batches; `done` is called after each batch.

    The model is in eval mode. No weight gets a gradient: none of its parameters may require any. Raises ValueError for
    batches without labels.
    """
    # some parameter before the first block must require a gradient for the blocks to get one
    source = model.bert.embeddings.norm.bias
    source.requires_grad_(True)
    watches = [
        (_Watch(layer.attention.out), _Watch(layer.feed_forward.down))
        for layer in model.bert.layers
    ]
    try:
        for batch in batches:
            loss = model(**batch).loss
            if loss is None:
                raise ValueError(NO_LABELS)
            if not math.isfinite(float(loss.detach())):
                raise ValueError(
                    f"the model's loss on the data is {float(loss.detach())}: check its weights and the labels"
                )
            torch.autograd.grad(loss * labels_in(batch), source)
            done()
    finally:
        source.requires_grad_(False)
        for watch in (w for pair in watches for w in pair):
            watch.remove()
    labels = sum(map(labels_in, batches))
    return [(first.found(labels), second.found(labels)) for first, second in watches]


def labels_in(batch: Mapping[str, Any]) -> int:
    """The number of terms in the mean that is the batch's loss; 1 where it has no labels."""
    labels = batch.get("labels", batch.get("start_positions"))
    return int((labels != -100).sum()) if isinstance(labels, Tensor) else 1


class _Watch:
    """Sees a block's last matrix in forward and backward."""

    def __init__(self, last: Any) -> None:
        self.inputs: Tensor | None = None
        self.gradients: Tensor | None = None
        self.rows = 0
        self._handle = last.register_forward_hook(self._seen)

    def _seen(self, last: Any, arguments: tuple[Any, ...], y: Tensor) -> None:
        y.register_hook(partial(self._collect, arguments[0].detach()))

    def _collect(self, h: Tensor, dy: Tensor) -> None:
        a = with_ones(h).float()
        g = dy.float()
        self.inputs = a.T @ a if self.inputs is None else self.inputs.addmm_(a.T, a)
        self.gradients = g.T @ g if self.gradients is None else self.gradients.addmm_(g.T, g)
        self.rows += h.shape[0]

    def found(self, labels: int) -> Statistics:
        assert self.inputs is not None
        assert self.gradients is not None
        return Statistics(self.inputs / self.rows, self.gradients / labels)

    def remove(self) -> None:
        self._handle.remove()


def with_ones(h: Tensor) -> Tensor:
    """[h, 1], with a number for the bias."""
    return torch.cat([h, h.new_ones(h.shape[0], 1)], 1)


def order(weight: Tensor, seen: Statistics, sizes: Sequence[int]) -> Order:
    """The order in which the heads or columns of a block's last matrix (C, K) are taken out.

    `sizes` are numbers of heads or columns that may be left, rising from 0 to all of them. Greedy: from one size to
    the next lower one those go whose loss raises the estimate least, each by itself, after what is left was changed
    for those that are out already.
    """
    count = sizes[-1]
    group = weight.shape[1] // count
    values, vectors = torch.linalg.eigh(seen.gradients.double())
    # (C, K + 1), so that squares of its numbers count as the loss does
    w = (values.clamp_min(0).sqrt()[:, None] * vectors.T) @ weight.double()
    w = torch.cat([w, w.new_zeros(w.shape[0], 1)], 1)
    inverse = torch.linalg.inv(_with_ridge(seen.inputs))
    left = torch.ones(count, dtype=torch.bool, device=w.device)
    inside = torch.arange(group, device=w.device)
    taken, losses = [], [0.0]
    for size, fewer in zip(sizes[:0:-1], sizes[-2::-1], strict=True):
        single = _rises(w, inverse, group).masked_fill(~left, torch.inf)
        chosen = single.argsort()[: size - fewer]
        left[chosen] = False
        taken.append(chosen)
        out = (chosen[:, None] * group + inside).flatten()
        rows = inverse[out]
        solved = torch.linalg.inv(rows[:, out])
        gone = w[:, out]
        losses.append(losses[-1] + float(((gone @ solved) * gone).sum()) / 2)
        w -= gone @ solved @ rows
        inverse -= rows.T @ solved @ rows
        # exactly out, with blocks that can be inverted
        w[:, out] = 0
        inverse[out], inverse[:, out] = 0, 0
        inverse[out, out] = 1
    return Order(torch.cat(taken), torch.tensor(losses[::-1], dtype=torch.float64))


def _rises(w: Tensor, inverse: Tensor, group: int) -> Tensor:
    """Twice the rise of the loss without each head or column alone, (n,)."""
    w, inverse = w[:, :-1], inverse[:-1, :-1]
    count = w.shape[1] // group
    blocks = inverse.unflatten(0, (count, group)).unflatten(2, (count, group))
    solved = torch.linalg.inv(blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1))  # (n, g, g)
    parts = w.unflatten(1, (count, group)).transpose(0, 1)  # (n, C, g)
    return ((parts @ solved) * parts).sum((1, 2))


def refitted(
    weight: Tensor,  # (C, K)
    bias: Tensor,  # (C,)
    inputs: Tensor,  # H
    kept: Tensor,  # int64 numbers of the inputs that are kept
) -> tuple[Tensor, Tensor]:
    """W and b of a block's last matrix with these inputs alone, by least squares on the dense model's inputs."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    out = gone.nonzero()[:, 0]
    stay = torch.cat([kept, kept.new_tensor([weight.shape[1]])])
    products = _with_ridge(inputs)
    change = torch.linalg.solve(
        products[stay][:, stay], products[stay][:, out] @ weight[:, out].T.double()
    )
    return weight[:, kept] + change[:-1].T.to(weight.dtype), bias + change[-1].to(bias.dtype)


def _with_ridge(inputs: Tensor) -> Tensor:
    """H + r I in fp64; the number for the bias counts towards no mean."""
    found = inputs.double()
    diagonal = found.diagonal()
    ridge = RIDGE * diagonal[:-1].mean().clamp_min(1e-30)
    return found + ridge * torch.eye(len(found)).to(found)
