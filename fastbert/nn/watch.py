"""Whether a module may be read instead of called: hooks, tracers and transformations that watch it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from fastbert.backend import torch_private

_log = logging.getLogger("fastbert")


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Log a sentence the first time it is met; traced code stays silent, the eager run says it."""
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        _log.info(message)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(m: nn.Module, *indifferent: str) -> bool:
    """Whether somebody watches or replaces a module's calls; hooks of the packages `indifferent` do not count."""
    state = m.__dict__
    # transformers 5.0 leaves a module's own method behind when it has recorded
    if "forward" in state and getattr(m.forward, "__func__", None) is not type(m).forward:
        return True
    if not any(map(state.__getitem__, _HOOKS)):
        return False
    hooks = [hook for name in _HOOKS for hook in state[name].values()]
    return any(not (getattr(h, "__module__", None) or "").startswith(indifferent) for h in hooks)


def observed() -> str | None:
    """Why modules must be called as they stand, whatever the model: somebody records or transforms all of them."""
    if torch_private.global_hooks():
        return "global module hooks are registered"
    if torch.compiler.is_compiling():
        return "it is being exported" if torch.compiler.is_exporting() else None
    if torch_private.tracing() is not None:
        return "it is being traced"
    return transformed()


def transformed() -> str | None:
    """Which transformation of torch is under way that the ops have no rule for."""
    if torch_private.functorch_active():
        return "torch.func is active"
    if torch_private.forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    return None


def first_hooked(modules: Iterable[nn.Module], *indifferent: str) -> nn.Module | None:
    """The first of these modules that is `hooked`, None if none is: one call instead of one a module."""
    for m in modules:
        state = m.__dict__
        watched = (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        )
        if watched and hooked(m, *indifferent):
            return m
    return None
