"""A correction of what is left: the last matrix of every block by least squares, without retraining.

A block's last matrix W and bias b are changed so that on sample texts the residual sum x + h W^T + b of the pruned
model comes close to the dense model's, from the first layer to the last. The pruned model's x and h come from its own
layers before, so that the correction makes up for a part of their error too. With A = [h, 1], R the difference of the
two sums, and a penalty r on the change D of [W, b]^T: D = (A^T A + r I)^-1 A^T R. (Kwon et al. 2022 scale the masks of
heads and columns by least squares.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert import functional as F
from fastbert.nn.layer import activate, activation_name, project

# penalties to choose from, in units of the mean of A^T A's diagonal
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# one batch in so many is left out of the sums at first, for the choice of the penalty
_HELD_OUT = 5


class Seen(NamedTuple):
    """What the layers see of a batch."""

    x: Tensor  # (T, C), the embeddings
    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int
    # (R,) int64, the rows that the last layer computes after attention; None: all
    rows: Tensor | None


class _Sums(NamedTuple):
    """A^T A, A^T R and the sum of R's squares, over tokens, in fp64."""

    aa: Tensor
    ar: Tensor
    rr: Tensor

    @classmethod
    def of(cls, h: Tensor, missing: Tensor) -> _Sums:
        a = torch.cat([h, h.new_ones(h.shape[0], 1)], 1).float()
        r = missing.float()
        # fp32 within a batch, fp64 between batches
        return cls((a.T @ a).double(), (a.T @ r).double(), r.double().square().sum())

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def solved(self, penalty: float) -> Tensor:
        """D (K + 1, C)."""
        ridge = penalty * self.aa.diagonal().mean().clamp_min(1e-30)
        return torch.linalg.solve(self.aa + ridge * torch.eye(len(self.aa)).to(self.aa), self.ar)

    def error(self, change: Tensor) -> float:
        """The sum of squares of R - A D."""
        return float(self.rr - 2 * (change * self.ar).sum() + (change * (self.aa @ change)).sum())


@torch.no_grad()
def correct(dense: Any, small: Any, seen: Sequence[Seen], done: Callable[[], None]) -> None:
    """Change the last matrices of the blocks of `small`; both models are in eval mode.

    `done` is called after each layer.
    """
    theirs = [s.x for s in seen]
    ours = theirs
    layers = [*zip(dense.bert.layers, small.bert.layers, strict=True)]
    for number, (full, left) in enumerate(layers):
        last = number == len(layers) - 1
        batches = [*seen] if last else [s._replace(rows=None) for s in seen]
        theirs, ours = _correct_block(
            _Block(_context, full.attention.out, full.attention_norm, full),
            _Block(_context, left.attention.out, left.attention_norm, left),
            *(theirs, ours, batches),
        )
        batches = [s._replace(rows=None) for s in seen]
        theirs, ours = _correct_block(
            _Block(_hidden, full.feed_forward.down, full.output_norm, full),
            _Block(_hidden, left.feed_forward.down, left.output_norm, left),
            *(theirs, ours, batches),
        )
        done()


class _Block(NamedTuple):
    """One block of a layer: norm(x + inner(x) W^T + b), where `last` has W and b."""

    inner: Callable[[Any, Tensor, Seen], Tensor]
    last: Any
    norm: Any
    layer: Any

    def parts(self, x: Tensor, batch: Seen) -> tuple[Tensor, Tensor]:
        """The inputs h of the last matrix, and the residual sum."""
        h = self.inner(self.layer, x, batch)
        return h, _at(x, batch.rows) + torch.addmm(self.last.bias, h, self.last.weight.T)


def _correct_block(
    full: _Block,
    left: _Block,
    theirs: Sequence[Tensor],  # each batch's x in the dense model
    ours: Sequence[Tensor],  # and in the pruned one
    batches: Sequence[Seen],
) -> tuple[list[Tensor], list[Tensor]]:
    """Correct the block `left` and return its outputs and those of `full`, the latter first."""
    following = []
    sums: list[_Sums | None] = [None, None]
    for i, (x, y, batch) in enumerate(zip(theirs, ours, batches, strict=True)):
        _, wanted = full.parts(x, batch)
        h, found = left.parts(y, batch)
        part = int(i % _HELD_OUT == _HELD_OUT - 1)
        new, old = _Sums.of(h, wanted - found), sums[part]
        sums[part] = new if old is None else old.plus(new)
        following.append(full.norm(wanted))
    change = _chosen(*sums)
    if change is not None:
        left.last.weight += change[:-1].T
        left.last.bias += change[-1]
    outputs = (left.norm(left.parts(y, b)[1]) for y, b in zip(ours, batches, strict=True))
    return following, [*outputs]


def _chosen(fitted: _Sums | None, held: _Sums | None) -> Tensor | None:
    """The change D, solved from all tokens; None if every penalty raises the error on the held-out tokens.

    The penalty is the one with the least error there. Without held-out tokens it is 0.1.
    """
    assert fitted is not None
    if held is None:
        return fitted.solved(0.1)
    errors = {p: held.error(fitted.solved(p)) for p in _PENALTIES}
    best = min(errors, key=errors.__getitem__)
    return fitted.plus(held).solved(best) if errors[best] < float(held.rr) else None


def _at(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _context(layer: Any, x: Tensor, batch: Seen) -> Tensor:
    """What attention gives to its output projection, (R, H D)."""
    if not layer.attention.qkv.num_heads:
        return _at(x, batch.rows)[:, :0]
    y = F.attention(layer.attention.qkv(x), batch.cu_seqlens, batch.max_seqlen)
    assert isinstance(y, Tensor)  # a pair only with return_lse
    return _at(y.flatten(1), batch.rows)


def _hidden(layer: Any, x: Tensor, batch: Seen) -> Tensor:
    """What the activation gives to the second product, (R, F)."""
    block = layer.feed_forward
    if not block.up.weight.numel():
        return x[:, :0]
    hidden = project(x, block.up.weight, block.up.bias)
    return activate(hidden, activation_name(block.approximate))
