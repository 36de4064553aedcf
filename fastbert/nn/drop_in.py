"""Drop-ins for torch.nn.LayerNorm, RMSNorm, GELU and CrossEntropyLoss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.nn.exports import replaces
from fastbert.nn.watch import log_once, why_not_ops
from fastbert.ops.context import autocast_dtype


def log_stock(module: nn.Module, reason: str | None) -> None:
    """Log once that a drop-in runs torch.nn's code, and why."""
    log_once(f"fastbert.nn.{type(module).__name__} runs torch.nn's code: {reason}")


def why_not_fused(x: Tensor) -> str | None:
    """Why the ops cannot take an input that torch.nn's code may take."""
    if torch.compiler.is_compiling():
        return None
    if type(x) not in (Tensor, nn.Parameter) or x.is_nested:
        return f"the input is a {'nested tensor' if x.is_nested else type(x).__name__}"
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        return f"the input is {x.dtype} of shape {tuple(x.shape)}"
    return why_not_ops()


def _rows(m: LayerNorm | RMSNorm, x: Tensor) -> Tensor | None:
    """x with the normalised dimensions flattened to one; None where its shape is another."""
    k = len(m.normalized_shape)
    if tuple(x.shape[-k:]) != tuple(m.normalized_shape):
        return None
    return x if k == 1 else x.flatten(-k)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over one or more trailing dimensions; returns the input's dtype, also under autocast."""

    @replaces(nn.LayerNorm)
    def forward(self, input: Tensor) -> Tensor:
        if reason := why_not_fused(input):
            log_stock(self, reason)
            return super().forward(input)
        x = _rows(self, input)
        if x is None:
            return super().forward(input)  # torch.nn's own error
        weight, bias = (None if t is None else t.flatten() for t in (self.weight, self.bias))
        return F.layer_norm(x, weight, bias, self.eps).view(input.shape)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over one or more trailing dimensions; returns the input's dtype, also under autocast."""

    @replaces(nn.RMSNorm)
    def forward(self, x: Tensor) -> Tensor:
        if reason := why_not_fused(x):
            log_stock(self, reason)
            return super().forward(x)
        rows = _rows(self, x)
        if rows is None:
            return super().forward(x)  # torch.nn's own error
        weight = None if self.weight is None else self.weight.flatten()
        return F.rms_norm(rows, weight, self.eps).view(x.shape)


class GELU(nn.GELU):
    """torch.nn.GELU, exact or tanh."""

    @replaces(nn.GELU)
    def forward(self, input: Tensor) -> Tensor:
        if reason := why_not_fused(input):
            log_stock(self, reason)
            return super().forward(input)
        return F.bias_gelu(input, None, self.approximate)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss: the mean over no labelled row is NaN, and the loss has the input's dtype, as there.

    The loss is computed in fp32 and then rounded; under autocast it stays fp32, as in torch.nn.
    """

    @replaces(nn.CrossEntropyLoss)
    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # (N, V), (N,)
        if reason := self._why_not_fused(input, target):
            log_stock(self, reason)
            return super().forward(input, target)
        if target.dtype == torch.uint8:
            target = target.long()
        loss = F.cross_entropy(
            input, target, ignore_index=self.ignore_index, reduction=self.reduction
        )
        return loss if autocast_dtype(input.device.type) is not None else loss.to(input.dtype)

    def _why_not_fused(self, input: Tensor, target: Tensor) -> str | None:
        if reason := why_not_fused(input):
            return reason
        if self.weight is not None:
            return "class weights are set"
        if self.label_smoothing != 0.0:
            return f"label_smoothing is {self.label_smoothing}"
        if target.is_floating_point():
            return "the targets are probabilities: pass class ids"
        if input.dim() != 2 or target.dim() != 1:
            return f"the input has {input.dim()} dimensions: flatten it to (N, classes)"
        return None
