"""What torch's exporters and tracers find in the place of our modules: plain torch operations, or one sentence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from types import FunctionType
from typing import Any

from torch import nn
from torch.fx import Proxy

from fastbert.backend import torch_private

Forward = Callable[..., Any]


def replaces(stock: type[nn.Module], own: Sequence[str] = ()) -> Callable[[Forward], Forward]:
    """Decorate the forward of a drop-in: exporters find the forward of `stock`, a class of torch.nn, in its place.

    `own` are keyword arguments that `stock` does not have: an exporter is refused where one is given.

    torch.export, torch.onnx.export and torch.jit.trace run that one. torch.fx decides as for a module of `stock`, by
    default to record a call of the module. torch.jit.script compiles its source.
    """
    theirs: Any = stock.forward
    exporting, leaf = torch_private.exporting, _leaf

    def known(kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `stock`."""
        given = [name for name in own if kwargs.pop(name, None) is not None]
        if given:
            raise NotImplementedError(
                f"{given[0]} is given while an exporter looks, which finds torch.nn.{stock.__name__}: pass a padded "
                "batch without it"
            )
        return kwargs

    def decorate(ours: Forward) -> Forward:
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            if exporting():
                return theirs(self, *args, **known(kwargs))
            for a in (*args, *kwargs.values()):
                if isinstance(a, proxy):
                    return leaf(a.tracer, self, stock, made, known, args, kwargs)
            return ours(self, *args, **kwargs)

        proxy = Proxy
        # torch.jit.script reads the source of `__wrapped__`, and looks names up in the globals of the function itself
        made = FunctionType(
            forward.__code__, theirs.__globals__, "forward", None, forward.__closure__
        )
        found: Any = wraps(theirs)(made)
        if own:
            # torch.export binds a call's arguments before it calls
            found.__signature__ = inspect.signature(ours)
        return found

    return decorate


def _leaf(
    tracer: Any,
    m: nn.Module,
    stock: type[nn.Module],
    forward: Forward,
    known: Callable[[dict[str, Any]], dict[str, Any]],
    args: Any,
    kwargs: Any,
) -> Any:
    """What torch.fx records for a call of a drop-in: the module, or the operations of the forward of `stock`."""
    if type(m).forward is forward and (path := tracer.path_of_module(m)):
        # the tracer decides by the class
        twin = stock.__new__(stock)
        twin.__dict__ = m.__dict__
        if tracer.is_leaf_module(twin, path):
            return tracer.create_proxy("call_module", path, args, kwargs)
    return stock.forward(m, *args, **known(kwargs))


def fx_leaf(forward: Forward) -> Forward:
    """Decorate a forward whose path depends on which arguments are given: torch.fx records a call of the module."""

    @wraps(forward)
    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # for the module that it was given, torch.fx makes one proxy of all positional arguments
        for a in (args,) if isinstance(args, Proxy) else (*args, *kwargs.values()):
            if isinstance(a, Proxy):
                tracer: Any = a.tracer
                path = tracer.path_of_module(self) if type(self).forward is called else ""
                if not path:
                    raise NotImplementedError(
                        f"torch.fx cannot look into {type(self).__name__}, where arguments decide what runs: "
                        "trace a module that calls it as a leaf (torch.fx.Tracer.is_leaf_module), or use torch.export"
                    )
                return tracer.create_proxy("call_module", path, args, kwargs)
        return forward(self, *args, **kwargs)

    # torch.fx would count the arguments of `__wrapped__`, and give them to this function
    del called.__wrapped__
    called.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return called


def refuse_script(m: nn.Module) -> nn.Module:
    """The `__prepare_scriptable__`, which torch.jit.script calls first, of modules that it cannot compile."""
    raise NotImplementedError(
        f"torch.jit.script cannot compile {type(m).__name__}: use torch.jit.trace, or torch.export"
    )
