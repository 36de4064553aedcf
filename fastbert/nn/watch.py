"""Whether a module's weights may be read instead of calling it: hooks, tracers and transforms that forbid it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastbert.backend import torch_private

_log = logging.getLogger("fastbert")


_logged: set[str] = set()


def log_once(message: str, level: int = logging.INFO) -> None:
    """Log a sentence once in this process; code under torch.compile logs nothing."""
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        _log.log(level, message)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(m: nn.Module, *ignored: str) -> bool:
    """Whether a module has hooks or a replaced forward; hooks of packages that begin with `ignored` do not count."""
    state = m.__dict__
    # transformers 5.0 leaves the module's own bound method in its __dict__ after recording outputs
    if "forward" in state and getattr(m.forward, "__func__", None) is not type(m).forward:
        return True
    if not any(map(state.__getitem__, _HOOKS)):
        return False
    return any(not _source(hook).startswith(ignored) for hook in _hooks(m))


def hooked_by(m: nn.Module, package: str) -> bool:
    """Whether a module has hooks of a package, "opacus." for example."""
    return any(_source(hook).startswith(package) for hook in _hooks(m))


def _hooks(m: nn.Module) -> list[Any]:
    return [hook for name in _HOOKS for hook in m.__dict__[name].values()]


def _source(hook: Any) -> str:
    """The name of the Python module that a hook comes from; of its function, if the hook is a functools.partial."""
    return getattr(getattr(hook, "func", hook), "__module__", None) or ""


def why_not_bypassed() -> str | None:
    """Why all modules must be called, whichever model it is: global hooks, export, tracing or a transform."""
    if torch_private.global_hooks():
        return "global module hooks are registered"
    if torch_private.exporting():
        return "it is being exported or traced"
    return None if torch.compiler.is_compiling() else why_not_ops()


def why_not_ops() -> str | None:
    """The active transform of torch that the ops have no rule for."""
    if torch_private.functorch_active():
        return "torch.func is active"
    if torch_private.forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    return None


def first_hooked(modules: Iterable[nn.Module], *ignored: str) -> nn.Module | None:
    """The first of these modules that is `hooked`, None if none is; faster than one call of `hooked` per module."""
    for m in modules:
        state = m.__dict__
        watched = (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        )
        if watched and hooked(m, *ignored):
            return m
    return None
