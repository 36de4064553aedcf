"""cross_entropy: loss_n = lse_n - logits[n, label_n], lse = log sum exp; ignored rows give 0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, nbytes


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def forward(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The loss of each row (N,) and lse (N,), both fp32."""
    (z,) = widen(logits)
    lse = z.logsumexp(-1)
    kept = labels != ignore_index
    # log_softmax is z - lse without rounding at the size of lse
    at_label = z.log_softmax(-1).gather(1, labels.where(kept, 0).long()[:, None])[:, 0]
    return (-at_label).where(kept, 0.0), lse


def backward(
    dloss: Tensor,  # (N,)
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    ignore_index: int,
) -> Tensor:
    """dlogits = (softmax(logits) - onehot(label)) dloss (N, V) in logits' dtype; 0 in ignored rows."""
    (z,) = widen(logits)
    kept = labels != ignore_index
    p = z.softmax(-1)
    onehot = torch.zeros_like(p).scatter(1, labels.where(kept, 0).long()[:, None], 1.0)
    scale = dloss.where(kept, 0.0)[:, None]
    return ((p - onehot) * scale).to(logits.dtype)


def eager(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The stock op in the tested dtype."""
    F = torch.nn.functional
    return F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction=reduction)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.cross_entropy`."""
    draw = Draw(dtype, device, seed)

    def call(N: int, V: int, fill: float = 0.6, **options: object) -> dict:
        return {"logits": draw.normal(N, V), "labels": draw.labels(V, N, fill), **options}

    yield Sample("N1-V2", call(1, 2, 1.0), "one pair")
    yield Sample("N7-V13", call(7, 13), "primes")
    yield Sample("N7-V13-sum", call(7, 13, reduction="sum"), "sum")
    yield Sample("N7-V13-none", call(7, 13, reduction="none"), "per row")
    yield Sample(
        "N9-V5-ignore",
        {"logits": draw.normal(9, 5), "labels": draw.ids(5, 9), "ignore_index": 2},
        "label 2 ignored",
    )
    yield Sample("N11-V30522", call(11, 30522), "BERT's vocabulary: rows 4-byte aligned only")
    peak = call(8, 33)
    peak["logits"][:, 5] = 200.0
    yield Sample("large", peak, "exp would overflow without the maximum")
    confident = call(6, 40, 1.0)
    confident["logits"].scatter_(1, confident["labels"][:, None], 16.0).sub_(30.0)
    yield Sample("confident", confident, "lse - logit of the label would be rounding")
    yield Sample("unlabelled", call(4, 6, 0.0, reduction="sum"), "no labelled row")
    yield Sample("empty", call(0, 6, reduction="sum"), "no row")


def cost(logits: Tensor, labels: Tensor, **_: object) -> Cost:
    """Forward reads each logit once; backward reads it again and writes its gradient."""
    return Cost(nbytes(logits, labels), 4 * logits.numel(), 2 * nbytes(logits), 5 * logits.numel())
