"""The Triton backend, installed as `fastbert.kernels`: one module per op, shared maths in `_math`.

`device_type` is the device of its tensors: "cuda" (also under ROCm), or "cpu" where TRITON_INTERPRET=1 makes Triton run
kernels on the CPU. Adapters read metadata only. Without a host sync, a CUDA graph can capture a forward and a backward.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from fastbert.backend import _common
from fastbert.backend._common import dropout_args as dropout_args
from fastbert.backend._gpu_mlm_loss import loss_width as loss_width
from fastbert.kernels import _configured

INTERPRETED: bool = triton.knobs.runtime.interpret
device_type = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from fastbert.kernels import _interpreter  # noqa: F401 -- patches Triton's interpreter

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# the chooser reads these, and device_type and loss_width above
configurations = _configured
starts_on_current_device = True
captured = True


def unsupported_dtype(**tensors: Tensor | None) -> str | None:
    """Why no kernel here takes these tensors, or None."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATS:
            return (
                f"{name} is {t.dtype} and the triton kernels take float32, bfloat16 and float16: "
                "cast it, or use the torch backend"
            )
    return None


unsupported_width = partial(_common.unsupported_width, "triton")
unsupported_dropout = partial(_common.unsupported_dropout, "triton")


def dense(t: Tensor | None) -> Tensor | None:
    """The tensor, copied if it is not contiguous."""
    return t if t is None or t.is_contiguous() else t.contiguous()
