"""The Triton backend, installed as `fastbert.kernels`: one module per op, shared maths in `_math`.

`device_type` is the device of its tensors: "cuda" (also under ROCm), or "cpu" where TRITON_INTERPRET=1 makes Triton run
kernels on the CPU. Adapters read metadata only. Without a host sync, a CUDA graph can capture a forward and a backward.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
device_type = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from fastbert.kernels import _interpreter  # noqa: F401 -- patches Triton's interpreter

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 8192


def unsupported_dtype(**tensors: Tensor | None) -> str | None:
    """Why no kernel here takes these tensors, or None."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATS:
            return (
                f"{name} is {t.dtype} and the triton kernels take float32, bfloat16 and float16: "
                "cast it, or use the torch backend"
            )
    return None


def unsupported_width(width: int) -> str | None:
    """Why a row of this width does not fit the kernels that hold whole rows in registers, or None."""
    if not 0 < width <= MAX_WIDTH:
        return (
            f"a row has {width} elements and the triton kernels hold 1 to {MAX_WIDTH} in registers: "
            "use the torch backend"
        )
    return None


def unsupported_dropout(p: float) -> str | None:
    """Why no kernel here takes this dropout probability, or None."""
    if p > 1 - 2**-32:
        return f"p is {p}: the triton kernel compares 32-bit words, pass p <= 1 - 2**-32"
    return None


def dropout_args(p: float, seed: Tensor | None, site: int) -> tuple[Tensor | None, int, int, float]:
    """A kernel's seed (None: no dropout), site, threshold and scale."""
    if p == 0.0 or seed is None:
        return None, 0, 0, 1.0
    return seed, site, round(p * 2**32), 1.0 / (1.0 - p)


def dense(t: Tensor | None) -> Tensor | None:
    """The tensor, copied if it is not contiguous."""
    return t if t is None or t.is_contiguous() else t.contiguous()
