"""torch's private functions and attributes that fastbert reads, in one place: another torch may rename them.

Each was seen in torch 2.13.0+cpu, and in 2.11.0+cu130 on a GPU. A name is bound to torch's own function, so that a call
adds no frame of ours.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

# its _current_level is 0 or more while forward-mode derivatives are taken
from torch.autograd import forward_ad as forward_ad
from torch.nn.modules import module

# whether autocast is on for any type of device
autocast_anywhere = torch._C._is_any_autocast_enabled
# whether torch.func (grad, jvp, vmap) runs this call, and whether a tensor belongs to it
functorch_active = torch._C._are_functorch_transforms_active
of_functorch = torch._C._functorch.is_functorch_wrapped_tensor
# the older vmap, which torch.autograd.grad(is_grads_batched=True) runs backward under
legacy_batched = torch._C._functorch.is_legacy_batchedtensor
add_batch = torch._add_batch_dim
remove_batch = torch._remove_batch_dim
# how many dispatch modes are on
dispatch_modes = torch._C._len_torch_dispatch_stack
profiling = torch._C._autograd._profiler_enabled
# the state of torch.jit.trace, None outside it
tracing = torch._C._get_tracing_state
# whether hooks for every module are registered
global_hooks = module._has_any_global_hook
# a device's number -> the handle of torch's current stream there; a torch without CUDA has no such function
raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
# a GPU waits so many cycles
sleep = torch.cuda._sleep
# sets every tensor of a list to zero
zero_all = torch._foreach_zero_
# how many references C++ has to a tensor
use_count: Any = torch.Tensor._use_count  # type: ignore[attr-defined]
# the shared library that holds torch's C++ code
LIBRARY = torch._C.__file__


def legacy_level() -> int:
    """How deep calls of the older vmap are nested."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def exporting() -> bool:
    """Whether torch.export, torch.onnx.export or torch.jit.trace records the calls: as plain torch operations."""
    return torch.compiler.is_exporting() or tracing() is not None


def fixed(*sizes: int) -> tuple[int, ...]:
    """Sizes as numbers that an exported program does not compute; torch.jit.trace hands out tensors for sizes."""
    if tracing() is None:
        return sizes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(map(int, sizes))


def traced_module() -> Any:
    """The module that torch.jit.trace or the TorchScript exporter of ONNX was given, None where it was a function."""
    names = torch.jit._trace._trace_module_map or {}
    first = next(iter(names), None)
    return names["__module"] if first == "__module" else first


def qualified_name(op: torch._ops.OpOverload) -> str:
    """A registered op's namespace and name."""
    return op._schema.name


def argument_names(op: torch._ops.OpOverload) -> list[str]:
    """The names of a registered op's arguments, in order."""
    return [argument.name for argument in op._schema.arguments]
