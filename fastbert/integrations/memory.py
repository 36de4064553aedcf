"""How much a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd saves in `forward()`, each counted once, in whole.

    `exclude` are tensors that are there anyway: parameters, inputs. Gradient checkpointing is not seen through.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # what is saved lives as long as the result does, so that no address is used twice
        result = forward()
    del result
    return sum(found.values())
