"""The one parity check of every op: a backend against the fp64 reference, both directions, within the budget."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastbert import functional
from fastbert.backend import chooser
from fastbert.backend.reference.samples import Sample
from fastbert.testing import poison
from fastbert.testing.budget import assert_within_budget

Results = dict[str, Tensor]


def samples(slug: str, dtype: torch.dtype, device: str = "cpu") -> list[Sample]:
    """The op's sample inputs in this dtype."""
    reference = importlib.import_module(f"fastbert.backend.reference.{slug}")
    return list(reference.sample_inputs(dtype, device))


def cases(slug: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, str, torch.dtype]]:
    """(backend, sample id, dtype) for every backend that has the op's kernel and a device to run it on."""
    for name in chooser.BACKENDS:
        if chooser.matrix()[slug][name] is None and chooser.device_of(name) is not None:
            for dtype in dtypes:
                for sample in samples(slug, dtype):
                    yield name, sample.id, dtype


def tree_map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """value, a tensor or a list of tensors, with every tensor changed; anything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(tree_map(v, change) for v in value)
    return value


def leaves_of(kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every floating-point argument, members of a list as name[i]."""
    for name, value in kwargs.items():
        for i, t in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(t, Tensor) and t.is_floating_point():
                yield (f"{name}[{i}]" if isinstance(value, (list, tuple)) else name), t


def upstream(y: Tensor) -> Tensor:
    """The fixed random gradient, fp32, that reaches an output of y's shape."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(y.shape, generator=generator).to(y.device)


def detached(kwargs: dict[str, Any], grad: bool = True) -> dict[str, Any]:
    """The arguments detached from any graph; with `grad` every float tensor requires a gradient."""
    return {
        k: tree_map(v, lambda t: t.detach().requires_grad_(grad and t.is_floating_point()))
        for k, v in kwargs.items()
    }


def call(
    op: Callable[..., Any],
    kwargs: dict[str, Any],
    backward: bool,
    gradient: Callable[[Tensor], Tensor] = upstream,
) -> Results:
    """The op's outputs, and with `backward` the gradient of every float input for fixed upstream gradients."""
    kwargs = detached(kwargs, backward)
    out = op(**kwargs)
    outs = out if isinstance(out, tuple) else (out,)
    results = {f"output {i}": t.detach() for i, t in enumerate(outs)}
    if not backward:
        return results
    leaves = dict(leaves_of(kwargs))
    found = [t for t in outs if t.requires_grad]
    # outputs of one shape get different gradients: the first one as drawn, the others reversed
    upstreams = [g if i == 0 else g.flip(-1) for i, g in enumerate(map(gradient, found))]
    upstreams = [g.to(t.dtype) for g, t in zip(upstreams, found, strict=True)]
    grads = torch.autograd.grad(found, list(leaves.values()), upstreams, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def _arguments(slug: str, sample_id: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The arguments of one of the op's samples."""
    reference = importlib.import_module(f"fastbert.backend.reference.{slug}")
    return next(s for s in reference.sample_inputs(dtype, device) if s.id == sample_id).kwargs


# the backends and instruction sets that are tested share it
@lru_cache(maxsize=512)
def _expected(
    slug: str, sample_id: str, dtype: torch.dtype, device: str, backward: bool
) -> tuple[Results, Results]:
    """A sample's results by the reference in fp64, and by stock ops in its own dtype."""
    kwargs = _arguments(slug, sample_id, dtype, device)
    wide = {
        k: tree_map(v, lambda t: t.double() if t.is_floating_point() else t)
        for k, v in kwargs.items()
    }
    with chooser.use("reference"):
        truth = call(getattr(functional, slug), wide, backward)
    reference = importlib.import_module(f"fastbert.backend.reference.{slug}")
    return truth, call(reference.eager, kwargs, backward)


def check(
    slug: str,
    name: str,
    sample_id: str,
    dtype: torch.dtype,
    backward: bool,
    again: bool = True,
) -> None:
    """Run one sample on one backend; raise AssertionError if results break the budget, are unwritten or vary.

    `again=False` omits the second run, for a device whose results cannot vary. A backend that does not support the call
    raises `backend.Unsupported` with its reason, which tests turn into a skip.
    """
    op, device = getattr(functional, slug), chooser.device_of(name) or "cpu"
    kwargs = _arguments(slug, sample_id, dtype, device)
    with chooser.use(name), poison.outputs():
        first = call(op, {k: tree_map(v, poison.surround) for k, v in kwargs.items()}, backward)
        second = call(op, kwargs, backward) if again else first
    truth, eager = _expected(slug, sample_id, dtype, device, backward)
    for key, expected in truth.items():
        ours = first[key]
        assert_within_budget(f"{slug} {name} {sample_id} {key}", ours, expected, eager[key])
        assert torch.equal(ours.nan_to_num(), second[key].nan_to_num()), (
            f"{key} varies between two runs"
        )
        if key.startswith("d"):
            given = dict(leaves_of(kwargs))[key[1:]]
            assert ours.dtype == given.dtype, f"{key} is {ours.dtype}, its input {given.dtype}"
