"""cross_entropy by torch's logsumexp and softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def _kept_labels(labels: Tensor, size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are labelled, labels that are safe to index with, and which labels were out of range (GPU only)."""
    kept = labels != ignore_index
    outside = kept & ((labels < 0) | (labels >= size))
    return kept, labels.where(kept & ~outside, 0).long(), outside


def forward(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The loss of each row (N,) and lse (N,), both fp32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    kept, safe, outside = _kept_labels(labels, logits.shape[1], ignore_index)
    # one fused pass; lse - logit would lose a confident row's digits
    at_label = logits.log_softmax(-1, dtype=wide).gather(1, safe[:, None])[:, 0]
    lse = logits.gather(1, safe[:, None])[:, 0] - at_label
    loss = (-at_label).where(kept, 0.0)
    return loss.masked_fill(outside, float("nan")), lse


def backward(
    dloss: Tensor,  # (N,)
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    ignore_index: int,
) -> Tensor:
    """dlogits (N, V) in logits' dtype; 0 in ignored rows."""
    kept, safe, outside = _kept_labels(labels, logits.shape[1], ignore_index)
    # not exp(logits - lse), which rounds at the size of lse
    p = logits.softmax(-1, dtype=lse.dtype)
    p.scatter_add_(1, safe[:, None], torch.full_like(lse, -1.0)[:, None])
    scale = dloss.where(kept, 0.0).masked_fill(outside, float("nan"))
    # a row that is ignored may hold infinities, and 0 * inf is not 0
    return p.mul_(scale[:, None]).masked_fill_(~kept[:, None], 0.0).to(logits.dtype)
