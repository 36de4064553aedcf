"""Soft targets: how far a student's predictions are from a teacher's, for class logits and for the masked LM.

Both losses are temperature^2 times the sum over rows of KL(softmax(teacher / temperature) || softmax(student /
temperature)). It differs from the cross-entropy with the teacher's probabilities by the teacher's entropy, which has no
gradient: an equal student has loss 0. The factor keeps the size of the gradients when the temperature changes (Hinton
et al. 2015).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, pad

from fastbert import functional
from fastbert.backend.chooser import choose
from fastbert.ops import _check
from fastbert.ops._register import once_differentiable, record, shared, sums, wants_grad
from fastbert.ops.context import autocast

# logits of a chunk of rows, 32 MB in fp32; up to seven tensors of this size live at a time
CHUNK = 2**23
# a product of fewer rows than this and a large vocabulary loses precision in MKL, which then adds one by one
_LEAST_ROWS = 16


def _divergence(
    logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of KL, log-probabilities of the student, of the teacher), all fp32, or fp64 where the student's are."""
    wide = sums(logits)
    log_p, log_q = (
        (z.to(wide) / temperature).log_softmax(-1) for z in (logits, teacher_logits.detach())
    )
    return kl_div(log_p, log_q, reduction="sum", log_target=True), log_p, log_q


def _check_options(temperature: float, reduction: str) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: pass a number above 0, 2.0 for instance")
    _check.one_of("reduction", reduction, ("mean", "sum"))


def soft_targets(
    logits: Tensor,  # (..., K)
    teacher_logits: Tensor,  # (..., K)
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Soft-target loss of class logits -> fp32 scalar; the formula is above.

    reduction: "mean" over rows, 0 and connected to the graph if there is no row; or "sum". The teacher is a constant.
    """
    _check_options(temperature, reduction)
    _check.floating(logits=logits, teacher_logits=teacher_logits)
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"the student's logits are {tuple(logits.shape)} and the teacher's {tuple(teacher_logits.shape)}: pass "
            "the logits of the same rows and classes"
        )
    total = temperature**2 * _divergence(logits, teacher_logits, temperature)[0]
    return total if reduction == "sum" else total / max(logits.shape[:-1].numel(), 1)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    """Even parts of the rows, each of at most CHUNK logits but at least one row; one empty part of no rows."""
    parts = max(-(-rows // max(CHUNK // vocabulary, 1)), 1)
    bounds = [rows * i // parts for i in range(parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def _linear_gradients(
    dlogits: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dweight, dbias of logits = h weight^T + bias; empty where not needed."""
    rows = h.shape[0]
    backend = choose("linear", h.device, h, weight, bias)
    if rows < _LEAST_ROWS:
        # rows of zeros add nothing
        dlogits, h = (pad(t, (0, 0, 0, _LEAST_ROWS - rows)) for t in (dlogits, h))
    dh, dweight, dbias = torch.ops.fastbert.linear_bwd(dlogits, h, weight, needs, sums(h), backend)
    return dh[:rows], dweight, dbias


def _by_chunks(
    hidden: Tensor,  # (R, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    teacher: tuple[Tensor, Tensor, Tensor | None],  # (R, C'), (V, C'), (V,)
    temperature: float,
    needs: list[bool],  # for hidden, weight, bias
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum of KL, and its gradients by hidden, weight and bias times temperature, None where not needed."""
    of_teacher, of_words, of_bias = teacher
    (weight,) = shared(hidden, [weight])
    wide = sums(hidden)
    total = hidden.new_zeros((), dtype=wide)
    dhidden = torch.empty_like(hidden) if needs[0] else None
    added: list[Tensor | None] = [None, None]
    for rows in _chunks(hidden.shape[0], weight.shape[0]):
        h = hidden[rows]
        logits = functional.linear(h, weight, bias)
        teacher_logits = functional.linear(of_teacher[rows], of_words, of_bias)
        loss, log_p, log_q = _divergence(logits, teacher_logits, temperature)
        total += loss
        if not any(needs):
            continue
        dlogits = log_p.exp_().sub_(log_q.exp_()).to(logits.dtype)
        dh, *found = _linear_gradients(dlogits, h, weight, bias, needs)
        if dhidden is not None:
            dhidden[rows] = dh
        for i in range(2):
            if needs[i + 1]:
                known, new = added[i], found[i]
                added[i] = new.to(wide) if known is None else known.add_(new)
    return total, [dhidden, *added]


class _SoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
    ) -> Tensor:
        *teacher, temperature = args
        needs = list(ctx.needs_input_grad[:3])
        total, grads = _by_chunks(hidden, weight, bias, tuple(teacher), temperature, needs)
        # the inputs are saved for once_differentiable, which finds by them that a second derivative is wanted
        ctx.save_for_backward(hidden, weight, bias, *grads)
        ctx.temperature = temperature
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        inputs, grads = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        scale = dloss / ctx.temperature
        scaled = (
            None if g is None else (g * scale).to(t.dtype)
            for t, g in zip(inputs, grads, strict=True)
        )
        return *scaled, *[None] * 4


def soft_targets_mlm(
    hidden: Tensor,  # (R, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    teacher_hidden: Tensor,  # (R, C')
    teacher_weight: Tensor,  # (V, C')
    teacher_bias: Tensor | None,  # (V,)
    *,
    temperature: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """Soft-target loss of the masked LM on its labelled rows -> fp32 scalar; the formula is above.

    hidden and teacher_hidden hold the labelled rows only, as the decoders get them. Logits are made for a chunk of rows
    at a time (CHUNK), and the gradients with them, in forward: no tensor has R V elements. Saves the gradients of
    hidden, weight and bias, as far as they are wanted. The teacher is a constant. reduction: "sum", or "mean" over
    rows; without a row the loss is 0 and connected to the graph. Under autocast both hidden states are cast. Refuses
    shapes that don't fit and decoders of different vocabularies.
    """
    _check_options(temperature, reduction)
    student = {"hidden": hidden, "weight": weight, "bias": bias}
    teacher = {
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
    }
    _check.floating(**student, **teacher)
    _check.shape("hidden", hidden, -1, -1)
    _check.shape("weight", weight, -1, hidden.shape[1])
    _check.shape("teacher_hidden", teacher_hidden, hidden.shape[0], -1)
    _check.shape("teacher_weight", teacher_weight, -1, teacher_hidden.shape[1])
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"the student's vocabulary has {weight.shape[0]} words and the teacher's {teacher_weight.shape[0]}: soft "
            "targets compare them word by word, so take a teacher with the student's vocabulary"
        )
    if 0 in (hidden.shape[1], teacher_hidden.shape[1], weight.shape[0]):
        raise ValueError(
            f"weight is {tuple(weight.shape)} and teacher_weight {tuple(teacher_weight.shape)}: no size may be 0"
        )
    _check.shape("bias", bias, weight.shape[0])
    _check.shape("teacher_bias", teacher_bias, weight.shape[0])
    _check.same_device(**student, **teacher)
    hidden, teacher_hidden = autocast(hidden).contiguous(), autocast(teacher_hidden).contiguous()
    inputs = (hidden, weight, bias)
    of_bias = None if teacher_bias is None else teacher_bias.detach()
    constant = (teacher_hidden.detach(), teacher_weight.detach(), of_bias)
    if wants_grad(*inputs):
        total = record(_SoftTargets, *inputs, *constant, temperature)
    else:
        total = _by_chunks(*inputs, constant, temperature, [False] * 3)[0]
    total = temperature**2 * total
    return total if reduction == "sum" else total / max(hidden.shape[0], 1)
