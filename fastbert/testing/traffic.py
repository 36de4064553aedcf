"""Bytes that Triton kernels move, counted by the interpreter: what each launch reads and writes at least once.

Bytes that several programs of one launch read count once, since they meet in the second-level cache; what a later
launch reads again counts again. Needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@dataclass
class Launch:
    """One kernel's traffic: the elements that its programs read and wrote, by size."""

    kernel: str
    _read: list[tuple[int, np.ndarray]] = field(default_factory=list)
    _written: list[tuple[int, np.ndarray]] = field(default_factory=list)

    @property
    def moved(self) -> int:
        """Distinct bytes read plus distinct bytes written."""
        return _distinct(self._read) + _distinct(self._written)


def _distinct(accesses: list[tuple[int, np.ndarray]]) -> int:
    """Bytes of the elements, each counted once; a tensor's elements are read in one size."""
    sizes = {size for size, _ in accesses}
    return sum(
        s * np.unique(np.concatenate([a for size, a in accesses if size == s])).size for s in sizes
    )


def _elements(pointers: Any, mask: Any) -> tuple[int, np.ndarray]:
    """The size and the addresses of the elements that the lanes under the mask touch."""
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    lanes, inside = np.broadcast_arrays(pointers.data, np.asarray(mask.data, dtype=bool))
    return size, lanes[inside]


@contextmanager
def counted() -> Iterator[list[Launch]]:
    """Inside, every launch of a Triton kernel appends its traffic."""
    launches: list[Launch] = []
    run, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def run_counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(Launch(self.fn.__name__))
        return run(self, *args, **kwargs)

    def load_counted(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1]._read.append(_elements(pointers, mask))
        return load(self, pointers, mask, *rest)

    def store_counted(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1]._written.append(_elements(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", run_counted),
        mock.patch.object(InterpreterBuilder, "create_masked_load", load_counted),
        mock.patch.object(InterpreterBuilder, "create_masked_store", store_counted),
    ):
        yield launches
