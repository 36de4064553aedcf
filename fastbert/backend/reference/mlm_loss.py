"""mlm_loss: sum over labelled rows of lse - logit[label], logit = hidden weight^T + bias (Devlin et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastbert.backend._common import picked
from fastbert.backend.reference import cross_entropy, linear
from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def forward(
    hidden: Tensor,  # (T, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,)
    rows: Tensor | None,  # (R,) rows of hidden, or None if hidden is (R, C)
    ignore_index: int,
    max_rows: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss (), lse (R,), both fp32, and p - onehot (R, V), empty without `save` or above max_rows."""
    logits = linear.forward(*widen(picked(hidden, rows), weight, bias))
    losses, lse = cross_entropy.forward(logits, labels, ignore_index)
    if not save or labels.shape[0] > max_rows:
        return losses.sum(), lse, hidden.new_empty(0, weight.shape[0])
    dlogits = cross_entropy.backward(torch.ones_like(lse), logits, labels, lse, ignore_index)
    return losses.sum(), lse, dlogits.to(hidden.dtype)


def backward(
    dloss: Tensor,  # ()
    hidden: Tensor,  # (T, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,)
    rows: Tensor | None,  # (R,)
    lse: Tensor,  # (R,)
    dlogits: Tensor,  # (R, V) p - onehot, unscaled, or empty
    ignore_index: int,
    max_rows: int,
    needs: Sequence[bool],  # for hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden (T, C), dweight (V, C), dbias (V,) fp32, scaled by dloss after the GEMMs; empty where not needed."""
    h, w, b, g = widen(picked(hidden, rows), weight, bias, dlogits)
    if labels.shape[0] > max_rows:
        logits = linear.forward(h, w, b)
        g = cross_entropy.backward(torch.ones_like(lse), logits, labels, lse, ignore_index)
    dh, dweight, dbias = (t * dloss for t in linear.backward(g, h, w, needs, w.dtype))
    if needs[0] and rows is not None:
        dh = torch.zeros(hidden.shape, dtype=dh.dtype, device=dh.device).index_add(0, rows, dh)
    return dh.to(hidden.dtype), dweight.to(weight.dtype), dbias


def eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    compacted: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    max_rows: int | None = None,
) -> Tensor:
    """Stock ops in the tested dtype, over all positions."""
    if rows is not None:
        hidden, labels = hidden[rows], labels[rows]
    loss = cross_entropy.eager(
        linear.eager(hidden, weight, bias), labels, ignore_index=ignore_index, reduction="sum"
    )
    return loss if reduction == "sum" else loss / (labels != ignore_index).sum().clamp(min=1)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.mlm_loss`."""
    draw = Draw(dtype, device, seed)

    def call(
        T: int,
        C: int,
        V: int,
        fill: float = 0.3,
        weights: torch.dtype | None = None,
        **options: object,
    ) -> dict:
        return {
            "hidden": draw.normal(T, C),
            "weight": draw.normal(V, C, scale=C**-0.5, dtype=weights),
            "bias": draw.normal(V, dtype=weights),
            "labels": draw.labels(V, T, fill),
            **options,
        }

    yield Sample("T3-C2-V2", call(3, 2, 2, 1.0), "the smallest vocabulary")
    yield Sample("T17-C5-V13", call(17, 5, 13), "primes")
    yield Sample("T17-C5-V13-sum", call(17, 5, 13, reduction="sum"), "sum")
    yield Sample("T17-C5-V13-chunked", call(17, 5, 13, 0.7, max_rows=3), "more rows than max_rows")
    given = call(17, 4, 11)
    yield Sample(
        "rows", given | {"rows": (given["labels"] >= 0).nonzero()[:, 0]}, "rows from the collator"
    )
    yield Sample(
        "compacted", call(9, 4, 11, 0.8, compacted=True), "labelled rows only, a few ignored"
    )
    yield Sample("nobias", call(9, 4, 11) | {"bias": None}, "no bias")
    yield Sample(
        "T64-C192-V1001", call(64, 192, 1001, 0.15), "a small vocabulary, BERT's share of labels"
    )
    yield Sample("unlabelled", call(5, 4, 7, 0.0), "no labelled row: 0, connected")
    yield Sample("empty", call(0, 4, 7), "no token")
    if low_precision(dtype):
        yield Sample("mixed", call(33, 32, 101, weights=torch.float32), "fp32 weights")


def cost(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **_: object) -> Cost:
    """GEMMs over the labelled rows, and their logits written once and read once."""
    rows = int((labels >= 0).sum())
    gemm = linear.cost(hidden[:rows], weight, bias)
    logits = 2 * rows * weight.shape[0] * hidden.element_size()
    return gemm._replace(forward_bytes=gemm.forward_bytes + logits)
