"""dropout_add_layer_norm, the native CPU kernel, against stock PyTorch eager and compiled, forward + backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastbert
from fastbert import functional
from fastbert.reference import dropout_add_layer_norm as reference
from fastbert.testing.budget import assert_within_budget
from fastbert.testing.parity import call
from fastbert.testing.samples import Draw
from fastbert.testing.timing import interleave


def sample(T: int, C: int, dtype: torch.dtype) -> dict:
    """BERT's post-LN step with dropout on (T, C)."""
    draw = Draw(dtype)
    return {
        "x": draw.normal(T, C),
        "residual": draw.normal(T, C),
        "weight": draw.normal(C, mean=1.0, scale=0.2),
        "bias": draw.normal(C),
        "p": 0.1,
        "seed": draw.seed(),
    }


def stock(x, residual, weight, bias, p, seed):
    """What a user writes: torch's own dropout, add, layer_norm."""
    z = residual + torch.nn.functional.dropout(x, p)
    return torch.nn.functional.layer_norm(z, z.shape[-1:], weight, bias, 1e-12)


def both_ways(op: Callable, kwargs: dict) -> Callable:
    """Forward and backward to every input."""
    leaves = {
        k: v.requires_grad_() if v.is_floating_point() else v for k, v in kwargs.items() if k != "p"
    }
    dy = torch.ones_like(kwargs["x"])
    wanted = [v for v in leaves.values() if v.requires_grad]
    return lambda: torch.autograd.grad(op(**leaves, p=kwargs["p"]), wanted, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("T", "C"), [(512, 768), (4096, 768), (4096, 1024)])
def test_dropout_add_layer_norm(benchmark, T, C, dtype):
    kwargs = sample(T, C, dtype)
    with fastbert.use("reference"):
        wide = {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in kwargs.items()
        }
        truth = call(functional.dropout_add_layer_norm, wide, backward=True)
    ours = call(functional.dropout_add_layer_norm, kwargs, backward=True)
    eager = call(reference.eager, kwargs, backward=True)
    for name, value in ours.items():
        assert_within_budget(name, value, truth[name], eager[name])
    competitors = {
        "fastbert": both_ways(functional.dropout_add_layer_norm, kwargs),
        "eager": both_ways(stock, kwargs),
        "compiled": both_ways(torch.compile(stock), kwargs),
    }
    times = interleave(competitors, rounds=30, warmup=5)
    moved = reference.cost(**{k: kwargs[k] for k in ("x", "residual", "weight", "bias")})
    benchmark.extra_info.update(
        gb_per_s=(moved.forward_bytes + moved.backward_bytes) / times["fastbert"].median / 1e9,
        ratio_to_eager=times["eager"].median / times["fastbert"].median,
        ratio_to_compiled=times["compiled"].median / times["fastbert"].median,
        **{name: vars(t) for name, t in times.items()},
    )
    benchmark.pedantic(competitors["fastbert"], rounds=10)
