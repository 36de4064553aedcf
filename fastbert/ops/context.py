"""What surrounds a call of an op: dropout seeds, autocast, tracing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.fx import Proxy

from fastbert.backend.torch_private import autocast_anywhere, dispatch_modes, exporting, profiling

Op = TypeVar("Op", bound=Callable[..., Any])


def exported_as(plain: Callable[..., Any]) -> Callable[[Op], Op]:
    """Decorate an op: an exporter records `plain`, a function of the same arguments in torch's own operations.

    torch.fx records a call of the op, as it does for torch's functions.
    """

    def decorate(op: Op) -> Op:
        @wraps(op)
        def call(*args: Any, **kwargs: Any) -> Any:
            if exporting():
                return plain(*args, **kwargs)
            for a in (*args, *kwargs.values()):
                if type(a) is Proxy:
                    return a.tracer.create_proxy("call_function", call, args, kwargs)
            return op(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def untraced(
    name: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function of tensors that torch.compile must not look into: there it is the op `fastbert::<name>`.

    For results whose size depends on values: the graph breaks at the op, and the function runs between the graphs.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"fastbert::{name}", function, mutates_args=())
        op.register_fake(fake)
        registered = getattr(torch.ops.fastbert, name).default

        @wraps(function)
        def call(*args: Any) -> Any:
            return registered(*args) if needs_dispatcher(args) else function(*args)

        return call

    return decorate


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def needs_dispatcher(args: Sequence[Any]) -> bool:
    """Whether a call must reach the registered op: torch.compile, a dispatch mode, the profiler, a subclass of Tensor.

    Plain eager calls skip torch's dispatcher, which takes 25 us of Python to box and unbox them (torch 2.13).
    """
    if torch.compiler.is_compiling() or dispatch_modes() or profiling():
        return True
    for a in args:
        if isinstance(a, torch.Tensor):
            if a.is_meta or type(a) not in _PLAIN:
                return True
        elif type(a) is list and needs_dispatcher(a):
            return True
    return False


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The autocast dtype of a device type, None where autocast is off or unknown (meta)."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the autocast dtype where autocast is on for its device, else x itself; fp64 is left alone, as by stock."""
    if not torch.compiler.is_compiling() and not autocast_anywhere():
        return x
    dtype = autocast_dtype(x.device.type)
    return x.to(dtype) if dtype is not None and x.dtype != torch.float64 else x


def seed_for(p: float, seed: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """The dropout seed: the caller's, or a fresh one on x's device from torch's generator.

    None at p = 0, and under an exporter, which records torch's own dropout.
    """
    if p == 0.0 or exporting():
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(
            f"seed must be one int64 on {x.device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}: "
            "draw it with torch.randint(2**62, (1,), device=x.device)"
        )
    return seed if seed.dim() == 1 else seed.reshape(1)
