"""The feed-forward blocks on packed tokens (T, C): BERT's own, and the one with a gate."""

from __future__ import annotations

from torch import Tensor, nn

from fastbert.nn.base import Block, Linear, bias_alone, without_gradients
from fastbert.nn.layer import (
    ACTIVATIONS,
    LayerSettings,
    LayerWeights,
    activation_name,
    feed_forward_block,
)
from fastbert.nn.watch import first_hooked
from fastbert.ops import _check


def _read(up: nn.Module, down: nn.Module) -> bool:
    """Whether both are plain Linears without hooks, so that their weights say everything about them."""
    # an adapter computes more than its weight
    return {type(up), type(down)} <= {Linear, nn.Linear} and first_hooked((up, down)) is None


class FeedForward(Block):
    """act(x W1' + b1) W2' + b2; `approximate` names the GELU ("none" is exact, "tanh"), None means ReLU.

    Of width 0 it is b2, or 0.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        approximate: str | None = "none",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size, bias)
        self.down = Linear(intermediate_size, hidden_size, bias)
        self.approximate = approximate
        without_gradients(self)

    def forward(self, x: Tensor) -> Tensor:  # (T, C) -> (T, C)
        up, down = self.up, self.down
        if getattr(down, "in_features", 1) == 0:
            return bias_alone(x, down)
        if _read(up, down):
            weights = LayerWeights(
                up=up.weight, up_bias=up.bias, down=down.weight, down_bias=down.bias
            )
        else:
            weights = LayerWeights(up=up, down=down)
        settings = LayerSettings(activation=activation_name(self.approximate))
        return feed_forward_block(x, weights, settings)


class GatedFeedForward(Block):
    """(act(a) * g) W2' + b2 with [a, g] = x W1' + b1: GEGLU, or SwiGLU where `activation` is "silu" (Shazeer 2020).

    `up` makes a, its first half, and g; `activation` is "gelu", "gelu_tanh" or "silu". Of width 0 it is b2, or 0.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check.one_of("activation", activation, ACTIVATIONS)
        self.up = Linear(hidden_size, 2 * intermediate_size, bias)
        self.down = Linear(intermediate_size, hidden_size, bias)
        self.activation = activation
        without_gradients(self)

    def forward(self, x: Tensor) -> Tensor:  # (T, C) -> (T, C)
        up, down = self.up, self.down
        if getattr(down, "in_features", 1) == 0:
            return bias_alone(x, down)
        if _read(up, down):
            biases = None if up.bias is None else [up.bias]
            weights = LayerWeights(
                up=[up.weight], up_bias=biases, down=down.weight, down_bias=down.bias
            )
        else:
            weights = LayerWeights(up=up, down=down)
        settings = LayerSettings(activation=self.activation, gated=True)
        return feed_forward_block(x, weights, settings)
