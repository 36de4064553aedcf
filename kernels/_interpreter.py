"""Corrects bf16 in Triton's interpreter 3.9, which truncates instead of rounding and multiplies bit patterns in `dot`.

Imported only in a process that interprets; it patches Triton in that process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _widened(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """The bit patterns of fp32 values rounded to the nearest bf16, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def _cast_impl(self: InterpreterBuilder, src: Any, dst_type: Any) -> Any:
    given, wanted = src.dtype.scalar, dst_type.scalar
    if given == tl.float32 and wanted == tl.bfloat16:
        return TensorHandle(_rounded(src.data), wanted)
    if given == tl.bfloat16 and wanted == tl.float32:
        return TensorHandle(_widened(src.data), wanted)
    return _cast(self, src, dst_type)


def _create_dot(self: InterpreterBuilder, a: Any, b: Any, *rest: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a, b = (TensorHandle(_widened(t.data), tl.float32) for t in (a, b))
    return _dot(self, a, b, *rest)


InterpreterBuilder.cast_impl = _cast_impl
InterpreterBuilder.create_dot = _create_dot
