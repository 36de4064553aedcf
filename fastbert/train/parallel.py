"""A model spread over processes: data parallel (DDP), or with sharded weights as well (FSDP2)."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from fastbert.train.world import World


class Spread:
    """A model spread over processes. A step calls `call`; the gradients that follow are means over the processes.

    DDP copies weights and exchanges gradients while backward goes on; FSDP2 (Zhao et al. 2023) keeps a part of each
    weight and of its moments on every process and gathers a layer's weights while it runs.
    """

    def __init__(self, model: Any, world: World) -> None:
        self.model = model
        self.world = world
        self.sharded = world.strategy == "fsdp" and world.size > 1
        self.call = model
        if self.sharded:
            _shard(model, world.size)
        elif world.size > 1:
            device = next(model.parameters()).device
            own = [device.index] if device.type == "cuda" else None
            self.call = nn.parallel.DistributedDataParallel(
                model, device_ids=own, gradient_as_bucket_view=True
            )

    def step_part(self, last: bool) -> AbstractContextManager[Any]:
        """The context for one batch of a step: gradients are exchanged in the `last` one only."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        elif self.world.size > 1 and not last:
            return self.call.no_sync()
        return nullcontext()

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with the model as its first argument, for calls that read weights outside of its forward.

        Sharded weights are gathered around each call.
        """
        if not self.sharded:
            return partial(function, self.model)
        from torch.distributed.fsdp import register_fsdp_forward_method

        name = function.__name__
        setattr(self.model, name, types.MethodType(function, self.model))
        register_fsdp_forward_method(self.model, name)
        return getattr(self.model, name)

    def clip(self, limit: float) -> Tensor:
        """Scale the gradient down to norm `limit`; returns its norm before that, over the parts of all processes."""
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def state(self, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """Weights and moments by the weights' names, each process with its part of them."""
        model, moments = get_state_dict(self.model, optimiser)
        return {"model": model, "optimiser": moments}

    def restore(self, state: dict[str, Any], optimiser: torch.optim.Optimizer) -> None:
        """Load what `state` returned, on this or on another number of processes."""
        set_state_dict(
            self.model,
            optimiser,
            model_state_dict=state["model"],
            optim_state_dict=state["optimiser"],
        )

    def whole(self) -> Any:
        """The model with all weights, on the main process; every process must call it.

        Sharded weights are gathered into a new model in the main process's memory.
        """
        if not self.sharded:
            return self.model
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        if not self.world.main:
            return self.model
        model = type(self.model)(self.model.config)
        model.load_state_dict(weights)
        return model


def _shard(model: Any, size: int) -> None:
    """Shard every layer by itself, then the rest as one: embeddings and heads, which the model's own methods read."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (size,))
    for layer in model.layers_to_shard:
        fully_shard(layer, mesh=mesh)
    # a tied decoder reads the word embedding after the layers
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
