"""PyTorch's own module database with our drop-ins: outputs, dtypes, gradients and refusals are torch.nn's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert

pytest.importorskip("expecttest", reason="torch's database of modules imports it")

from torch.testing._internal.common_modules import module_db

KINDS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GELU,
    nn.CrossEntropyLoss,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.Transformer,
)
BUDGET = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def leaf(t: Any) -> Any:
    """A copy of an argument; floating-point ones require a gradient."""
    if not isinstance(t, Tensor):
        return t
    return t.detach().clone().requires_grad_(t.is_floating_point())


def outcome(m: nn.Module, given: Any) -> tuple[list[Tensor | None], Exception | None]:
    """Outputs and gradients of a call, or its error."""
    args = [leaf(t) for t in given.args]
    kwargs = {name: t if "mask" in name else leaf(t) for name, t in given.kwargs.items()}
    try:
        y = m(*args, **kwargs)
    except Exception as error:
        return [], error
    outputs = list(y) if isinstance(y, tuple) else [y]
    if outputs[0].requires_grad:
        outputs[0].float().square().mean().backward()
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    return [*outputs, *(t.grad for t in (*inputs, *m.parameters()))], None


def differs(ours: Tensor | None, theirs: Tensor | None, budget: float) -> bool:
    """Whether a result is not torch.nn's: another dtype or shape, or an error above the budget."""
    if ours is None or theirs is None:
        return any(t is not None and bool(t.any()) for t in (ours, theirs))
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return True
    a, b = ours.double(), theirs.double()
    scale = max(1.0, float(b.abs().nan_to_num().max())) if b.numel() else 1.0
    return not torch.allclose(a, b, rtol=budget, atol=budget * scale, equal_nan=True)


def without_dropout(m: nn.Module) -> nn.Module:
    """The module with every probability of dropout at 0."""
    for part in m.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return m


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("kind", KINDS)
def test_every_case_of_the_database(kind: Any, dtype: torch.dtype) -> None:
    (info,) = (i for i in module_db if i.module_cls is kind)
    cases, wrong = 0, []
    for training in (True, False):
        options = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = info.module_inputs_func(info, **options)
        for case in inputs:
            if case.forward_input is None:
                continue
            made = case.constructor_input
            torch.manual_seed(0)
            stock = without_dropout(kind(*made.args, **made.kwargs).to(dtype).train(training))
            ours = fastbert.accelerate(copy.deepcopy(stock))
            (x, x_error), (y, y_error) = (outcome(m, case.forward_input) for m in (stock, ours))
            cases += 1
            pairs = zip(y, x, strict=False)
            if type(x_error) is not type(y_error) or any(differs(*p, BUDGET[dtype]) for p in pairs):
                wrong.append((made.kwargs, case.forward_input.kwargs, x_error, y_error))
    assert cases > 0
    assert not wrong, f"{len(wrong)} of {cases} cases, first: {wrong[0]}"
