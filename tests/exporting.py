"""Exports of a model by each of torch's exporters, as a function of the arguments that the model takes."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

MASK = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
# of other sizes: a hole, a batch row without padding, padding on both sides
OTHER = torch.tensor([[1, 0, 1, 0, 1, 1, 1, 1, 0], [1] * 9, [0, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 9])
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason=f"needs {', '.join(PACKAGES)}",
)
NAMES = ("input_ids", "attention_mask")
Call = Callable[[dict[str, Tensor]], list[Tensor]]


def batch(mask: Tensor) -> dict[str, Tensor]:
    """Random ids for a mask; a padding id at padding."""
    return {
        "input_ids": torch.randint(3, 99, mask.shape) * mask + (1 - mask),
        "attention_mask": mask,
    }


def values(output: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return list(output.values() if isinstance(output, dict) else output)


def exported(m: nn.Module, given: dict[str, Tensor], strict: bool = False) -> Call:
    """By torch.export with a dynamic batch and length; the program holds no operation but torch's."""
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        m, (), given, strict=strict, dynamic_shapes=dict.fromkeys(given, sizes)
    )
    named = [str(node.target) for node in program.graph.nodes]
    assert not [name for name in named if "fastbert" in name]
    return lambda other: values(program.module()(**other))


def traced(m: nn.Module, given: dict[str, Tensor]) -> Call:
    """By torch.jit.trace, whose check is on; the graph holds neither our ops nor an autograd Function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(m, example_kwarg_inputs=given, strict=False)
    graph = str(program.inlined_graph)
    assert "fastbert::" not in graph
    assert "^" not in graph
    return lambda other: values(program(**other))


def onnx(m: nn.Module, given: dict[str, Tensor], file: Path, dynamo: bool) -> Call:
    """By torch.onnx.export, run by onnxruntime."""
    import onnxruntime

    sizes = {name: {0: "batch", 1: "length"} for name in given}
    dynamic = {"dynamic_shapes": sizes} if dynamo else {"dynamic_axes": sizes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            m,
            (),
            str(file),
            kwargs=given,
            dynamo=dynamo,
            input_names=list(given),
            verbose=False,
            **dynamic,  # type: ignore[arg-type]
        )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def call(other: dict[str, Tensor]) -> list[Tensor]:
        found = session.run(None, {name: t.numpy() for name, t in other.items()})
        return [torch.as_tensor(t) for t in found]

    return call


def agree(found: list[Tensor], wanted: Any, mask: Tensor) -> None:
    """Equal within rounding, at tokens, and of a cosine of at least 0.99999."""
    wanted = values(wanted)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        if b.shape[:2] == mask.shape:
            a, b = a[mask == 1], b[mask == 1]
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99999
