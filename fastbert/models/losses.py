"""The losses of classifiers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert import functional as F
from fastbert.nn.packing import Packing


def class_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """The sum of cross-entropies of logits (N, classes) over labels (N,) other than -100, divided by `count`.

    Without `count`, divided by the number of these labels; 0 if there is none.
    """
    labels = labels.reshape(-1)
    total = F.cross_entropy(logits, labels, reduction="sum")
    return total / ((labels != -100).sum().clamp(min=1) if count is None else count)


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """A sequence classifier's loss for problem_type; None derives it from the labels, as in transformers."""
    classes = logits.shape[-1]
    if problem_type is None:
        kinds = "multi_label_classification", "single_label_classification"
        integers = labels.dtype in (torch.int64, torch.int32)
        problem_type = "regression" if classes == 1 else kinds[integers]
    if problem_type == "single_label_classification":
        return class_loss(logits, labels)
    if classes == 1:
        logits, labels = logits.reshape(-1), labels.reshape(-1)
    if logits.shape != labels.shape or not labels.is_floating_point():
        raise ValueError(
            f"{problem_type} takes floating-point labels of shape {tuple(logits.shape)}, "
            f"not {tuple(labels.shape)} {labels.dtype}"
        )
    if problem_type == "regression":
        return tnf.mse_loss(logits, labels)
    return tnf.binary_cross_entropy_with_logits(logits, labels)


def contrastive_loss(logits: Tensor, kind: str) -> Tensor:
    """The loss of logits (B, B) whose diagonal has the pairs: the mean over pairs.

    softmax: the mean of the cross-entropies of rows and of columns (CLIP). sigmoid: each of the B B logits is a yes or
    a no of its own (SigLIP).
    """
    B = logits.shape[0]
    if kind == "softmax":
        labels = torch.arange(B, device=logits.device)
        return (class_loss(logits, labels) + class_loss(logits.T.contiguous(), labels)) / 2
    signs = 2.0 * torch.eye(B, dtype=logits.dtype, device=logits.device) - 1.0
    return -tnf.logsigmoid(signs * logits).sum() / B


def position_loss(scores: Tensor, position: Tensor, packing: Packing) -> Tensor:
    """Cross-entropy of scores (T,) over each sequence's tokens; a position (B,) without a token is ignored."""
    grid = packing.spread(scores)  # (B, S)
    token = packing.spread(torch.ones_like(scores, dtype=torch.bool))
    length = grid.shape[1]
    position = position.reshape(-1)
    inside = (position >= 0) & (position < length)
    position = position.clamp(0, length - 1)
    inside = inside & token.gather(1, position[:, None]).squeeze(1)
    grid = grid.masked_fill(~token, torch.finfo(grid.dtype).min)
    return class_loss(grid, torch.where(inside, position, -100))
