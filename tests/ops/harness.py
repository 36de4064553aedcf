"""Parametrisation shared by tests/ops/test_<slug>.py: backends x sample inputs x dtypes, gradcheck, compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastbert import functional
from fastbert.backend import chooser, cpu
from fastbert.testing import parity

INTERPRETED = chooser.device_of("triton") == "cpu"
# the interpreter leaves out fp16, whose kernels are those of bf16; tests/ptx runs both as compiled
DTYPES = (torch.float32, torch.bfloat16, torch.float16)[: 2 if INTERPRETED else 3]


def short(dtype: torch.dtype) -> str:
    """A dtype as test ids spell it: bf16, fp16 or fp32."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def forms(name: str) -> list[str]:
    """The backend's name; of cpu, cpu/<set> for each instruction set."""
    return [f"cpu/{isa}" for isa in cpu.native.isas()] if name == "cpu" and cpu.native else [name]


def backends(slug: str) -> list[str]:
    """The backends that have the op's kernel and a device to run it on, cpu per instruction set."""
    there = [name for name, reason in chooser.matrix()[slug].items() if reason is None]
    return [form for name in there if chooser.device_of(name) for form in forms(name)]


def parametrize(slug: str) -> pytest.MarkDecorator:
    """Every (backend, sample, dtype) of the op, with ids such as torch-T63-C768-bf16; cpu per instruction set."""
    rows = [
        (form, sample, dtype)
        for name, sample, dtype in parity.cases(slug, DTYPES)
        for form in forms(name)
    ]
    ids = [f"{name}-{sample}-{short(dtype)}" for name, sample, dtype in rows]
    return pytest.mark.parametrize(("name", "sample", "dtype"), rows, ids=ids)


def check(slug: str, name: str, sample: str, dtype: torch.dtype, backward: bool) -> None:
    """parity.check; the reason of a backend that cannot run the call becomes a skip. `name` may be cpu/<set>."""
    name, _, isa = name.partition("/")
    # Triton's interpreter runs one program after the other: no second run there
    again = name != "triton" or not INTERPRETED
    try:
        with instruction_set(isa):
            parity.check(slug, name, sample, dtype, backward, again)
    except chooser.Unsupported as reason:
        pytest.skip(str(reason))


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """Inside, the native kernels of this instruction set run; "" changes nothing."""
    before = cpu.native.isa() if isa else ""
    if isa:
        cpu.native.use_isa(isa)
    try:
        yield
    finally:
        if isa:
            cpu.native.use_isa(before)


def tensors(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The sample's arguments with every float tensor a leaf that requires a gradient."""
    return {
        k: parity.tree_map(v, lambda t: t.clone().requires_grad_(t.is_floating_point()))
        for k, v in kwargs.items()
    }


def gradcheck(slug: str, name: str) -> None:
    """torch.autograd.gradcheck of the public op in fp64 for every sample of at most 200 elements an input.

    Samples with a padding row are left out: that row gets no gradient on purpose, though the output depends on it.
    """
    ran = 0
    for sample in parity.samples(slug, torch.float64):
        leaves = dict(parity.leaves_of(sample.kwargs))
        if any(t.numel() > 200 for t in leaves.values()) or "padding" in sample.id:
            continue
        names = list(leaves)

        def function(*values: torch.Tensor, sample: Any = sample, names: list[str] = names) -> Any:
            given = dict(zip(names, values, strict=True))
            kwargs = {
                k: [given.get(f"{k}[{i}]", t) for i, t in enumerate(v)]
                if isinstance(v, list)
                else given.get(k, v)
                for k, v in sample.kwargs.items()
            }
            return getattr(functional, slug)(**kwargs)

        with chooser.use(name):
            inputs = tuple(t.clone().requires_grad_() for t in leaves.values())
            # the registered op is reentrant and deterministic, so the default tolerances hold
            assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        ran += 1
    assert ran, f"no sample of {slug} is small enough for gradcheck"


def compiled(
    slug: str,
    name: str,
    pick: Callable[[str], bool] = lambda _: True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """fullgraph compilation of the op gives eager's outputs and gradients for the picked samples."""
    op = getattr(functional, slug)
    for sample in parity.samples(slug, dtype):
        if not pick(sample.id):
            continue
        torch._dynamo.reset()
        with chooser.use(name):
            expected = parity.call(op, sample.kwargs, True)
            ours = parity.call(
                torch.compile(op, fullgraph=True, backend="aot_eager"), sample.kwargs, True
            )
        for key, value in expected.items():
            assert value.dtype == ours[key].dtype
            assert torch.equal(value.nan_to_num(), ours[key].nan_to_num()), (
                f"{slug} {sample.id} {key}"
            )
