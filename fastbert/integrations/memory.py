"""How many bytes a forward saves for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd saves in `forward()`; each storage counts once, with its whole size.

    Storages of the tensors in `exclude`, such as parameters and inputs, do not count. Tensors that
    gradient checkpointing keeps outside of autograd do not count either.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # saved tensors live as long as the result, so no address is reused while they are counted
        result = forward()
    del result
    return sum(found.values())
