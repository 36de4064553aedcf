"""Registers an op's forward and backward with torch.library, once per slug, under the backend's name as an argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch

from fastbert.backend import chooser, torch_private, tuned
from fastbert.backend.torch_private import (
    argument_names,
    autocast_anywhere,
    forward_ad,
    functorch_active,
    legacy_batched,
    of_functorch,
)
from fastbert.ops.context import autocast_dtype, needs_dispatcher

_lib = torch.library.Library("fastbert", "DEF")


def register(
    slug: str,
    direction: str,
    schema: str,
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    tuned_by: tuned.TunedBy | None = None,
) -> Callable[..., Any]:
    """Define `fastbert::<slug>_<fwd|bwd>` and return it as a callable.

    The body looks up the backend's module by the last argument and calls its `forward` or `backward` with the others.
    `check` sees the same arguments and refuses bad values (ids, labels, cu_seqlens) where values are checked at all.
    `tuned_by` names the arguments by which fastbert.tune() tells calls apart; without it the op is not tuned. `choose`
    must get the forward's arguments in the schema's order.
    """
    name = f"{slug}_{'fwd' if direction == 'forward' else 'bwd'}"
    inputs, outputs = schema.split("->")
    inputs = inputs.strip().removesuffix(")")
    _lib.define(f"{name}{inputs}, str backend) ->{outputs}", tags=(torch.Tag.pt2_compliant_tag,))

    def body(*args: Any) -> Any:
        *inputs, chosen = args
        run = getattr(chooser.module(chosen, slug), direction)
        if chosen in chooser.ON_CURRENT_DEVICE:
            run = partial(_on_device, run)
        if check is None and not autocast_anywhere():
            return run(*inputs)
        device = next(a.device for a in inputs if isinstance(a, torch.Tensor))
        if check is not None and chooser.checks_values(device):
            check(*inputs)
        if autocast_dtype(device.type) is not None:
            # dtypes were settled before the op: stock ops inside it must not cast again
            torch.set_autocast_enabled(device.type, False)
            try:
                return run(*inputs)
            finally:
                torch.set_autocast_enabled(device.type, True)
        return run(*inputs)

    _lib.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastbert::{name}", fake, lib=_lib)
    registered = getattr(torch.ops.fastbert, name).default
    if tuned_by is not None:
        names = argument_names(registered)
        tuned.register(slug, direction == "backward", names[:-1], tuned_by)

    def call(*args: Any) -> Any:
        return registered(*args) if needs_dispatcher(args) else body(*args)

    return call


def _on_device(run: Callable[..., Any], *inputs: Any) -> Any:
    """run(*inputs) with the GPU of the inputs as the current one, on which our kernels start, unlike torch's own."""
    device = next(a.device for a in inputs if isinstance(a, torch.Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return run(*inputs)
    with torch.cuda.device(device):
        return run(*inputs)


def record(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args). Eager calls leave out its Python part, which takes 6 us and only serves torch.func."""
    if torch.compiler.is_compiling() or functorch_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class _Once(torch.autograd.Function):
    """Returns the first `count` tensors and depends on all of them; its backward, a second derivative, raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor | None) -> Any:
        return tuple(None if t is None else t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "fastbert's kernels have no second derivatives: use stock modules for them (fastbert.restore(model))"
        )


def once_differentiable(
    backward: Callable[..., Any], twice: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Decorate a Function's backward: a second derivative raises, whichever function of torch takes it.

    torch's decorator of this name cuts the graph: torch.autograd.functional.hvp and jvp would return zeros.

    `twice` is the same backward in plain torch. Where autograd records the backward (create_graph=True), `twice` runs
    in its place, and nothing raises. `twice` returns None where it cannot compute the gradients.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        if functorch_active():
            _refuse_wrapped(grads)
        if any(g is not None and legacy_batched(g) for g in grads):
            return _each(once, ctx, grads)
        sources = []
        if torch.is_grad_enabled():
            ctx = _Read(ctx)
            sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if sources and twice is not None and (found := twice(ctx, *grads)) is not None:
            return found
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not sources:
            return found
        found = found if isinstance(found, tuple) else (found,)
        places = [i for i, t in enumerate(found) if isinstance(t, torch.Tensor)]
        passed = _Once.apply(len(places), *(found[i] for i in places), *sources)
        passed = dict(zip(places, passed, strict=True))
        return tuple(passed.get(i, value) for i, value in enumerate(found))

    return once


class _Read:
    """A Function's context that reads the saved tensors once: activation checkpointing returns them only once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def through_torch(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], dy: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradients of function(*inputs), in plain torch operations, which torch can differentiate again.

    None for an input that requires no gradient. `function` gets aliases of the inputs: hooks on the inputs themselves
    run once, in the outer backward.
    """
    aliases = [t if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    y = function(*aliases)
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ())
    return [next(found) if t is not None and t.requires_grad else None for t in aliases]


def _each(backward: Callable[..., Any], ctx: Any, grads: Sequence[Any]) -> Any:
    """The backward of gradients that the older vmap has batched: one by one, batched again."""
    level = torch_private.legacy_level()
    batched = next(g for g in grads if g is not None and legacy_batched(g))
    count = torch_private.remove_batch(batched, level, 1, 0).shape[0]
    apart = [g if g is None else torch_private.remove_batch(g, level, count, 0) for g in grads]
    found = []
    for i in range(count):
        one = backward(ctx, *(g if g is None else g[i] for g in apart))
        found.append(one if isinstance(one, tuple) else (one,))
    return tuple(
        torch_private.add_batch(torch.stack(same), 0, level)
        if isinstance(same[0], torch.Tensor)
        else same[0]
        for same in zip(*found, strict=True)
    )


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record a call with these inputs; refuses those of torch.func: results would be wrong."""
    if not torch.compiler.is_compiling():
        if functorch_active():
            _refuse_wrapped(tensors)
        if forward_ad._current_level >= 0:
            _refuse_duals(tensors)
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _refuse_wrapped(tensors: Sequence[torch.Tensor | None]) -> None:
    if any(t is not None and of_functorch(t) for t in tensors):
        raise NotImplementedError(
            "fastbert's ops do not run under torch.func (grad, jvp, vmap): use torch.autograd, or stock ops in there"
        )


def _refuse_duals(tensors: Sequence[torch.Tensor | None]) -> None:
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "fastbert's ops have no forward-mode derivatives: use stock modules for them (fastbert.restore(model))"
        )


def shared(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """The weights, of one dtype, as forward and backward read them.

    On a GPU they are cast to x's dtype, once for both. Several weights of one shape lie side by side in the copy.
    Kernels on a CPU read the weights as they are.
    """
    if not x.is_cuda or weights[0].dtype == x.dtype:
        return weights
    if len(weights) == 1:
        return [weights[0].to(x.dtype)]
    joined = x.new_empty(len(weights), *weights[0].shape)
    for part, weight in zip(joined, weights, strict=True):
        part.copy_(weight)
    return list(joined)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as contiguous rows (N, C): x itself where it is that already."""
    if not torch.compiler.is_compiling() and x.dim() == 2 and x.is_contiguous():
        return x
    return x.reshape(-1, x.shape[-1]).contiguous()


def as_shape(y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Rows y (N, C) in the shape of the op's input: y itself where that had rows too."""
    return y if len(shape) == 2 else y.view(shape)


def sums(x: torch.Tensor) -> torch.dtype:
    """The dtype of statistics and of biases' gradients: fp32, or fp64 where x is.

    The biases may be of another dtype than the weights; autograd rounds what backward returns to the input's.
    """
    return torch.promote_types(x.dtype, torch.float32)


def none_if_empty(grad: torch.Tensor) -> torch.Tensor | None:
    """The gradient, or None. A registered op returns tensors only: one that is not needed has no elements."""
    return grad if grad.numel() else None
