"""Sample inputs and the cost of a call, which every op's reference has for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of a public op: an id for the test, the keyword arguments, and why the shape is there."""

    id: str
    kwargs: dict[str, Any]
    why: str = ""


class Cost(NamedTuple):
    """The least that a call must move and compute: bytes read + written once, and floating-point operations."""

    forward_bytes: int
    forward_flops: int
    backward_bytes: int
    backward_flops: int


class Draw:
    """Deterministic random tensors for sample inputs, in one dtype on one device."""

    def __init__(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def normal(
        self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Normal values of this shape, in the draw's dtype unless another is named."""
        values = torch.randn(*shape, generator=self._generator) * scale + mean
        return values.to(self.device, dtype or self.dtype)

    def ids(self, high: int, *shape: int) -> Tensor:
        """int64 ids in [0, high)."""
        return torch.randint(high, shape, generator=self._generator).to(self.device)

    def labels(self, high: int, count: int, fill: float, ignore_index: int = -100) -> Tensor:
        """int64 labels (count,), of which about `fill` are in [0, high) and the rest ignored."""
        labelled = torch.rand(count, generator=self._generator) < fill
        return torch.where(labelled.to(self.device), self.ids(high, count), ignore_index)

    def cu_seqlens(self, *lengths: int) -> Tensor:
        """Running sums of the lengths, int32 (B + 1,)."""
        return torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)

    def seed(self) -> Tensor:
        """A dropout seed."""
        return torch.randint(2**62, (1,), generator=self._generator).to(self.device)


def low_precision(dtype: torch.dtype) -> bool:
    """Whether the dtype is bf16 or fp16, which are also tested with fp32 weights."""
    return dtype in (torch.bfloat16, torch.float16)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
