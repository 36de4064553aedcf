"""Which modules of a transformers model compute what: read in their place, run on packed tokens, or left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert import nn as drop_in
from fastbert.nn.watch import hooked

_GELUS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "QuickGELUActivation": "sigmoid",
}
_FUNCTIONS = {
    *(getattr(torch, name) for name in ("relu", "sigmoid", "tanh", "selu", "celu")),
    *(
        getattr(tnf, name)
        for name in ("elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "relu")
    ),
    *(
        getattr(tnf, name)
        for name in ("relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh")
    ),
}
# packages whose hooks work on packed tokens too: they record hidden states, which are padded afterwards, or attentions,
# which no packed forward returns, or they make the embeddings' output require a gradient
RECORDERS = ("transformers.utils.", "transformers.modeling_utils", "peft.utils.")
_ORDINARY = (nn.Parameter, Tensor)
NORMS = (nn.LayerNorm, drop_in.LayerNorm)
# FSDP2 attaches hooks to the modules that it gathers
SHARDING = "torch.distributed."


def plain(m: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias of an nn.Linear without hooks and with ordinary tensors, None for any other module."""
    if type(m) is not nn.Linear or hooked(m, *RECORDERS):
        return None
    weight, bias = m.weight, m.bias
    if type(weight) in _ORDINARY and (bias is None or type(bias) in _ORDINARY):
        return weight, bias
    return None


def _adapter(m: nn.Module) -> bool:
    return type(m).__module__.startswith("peft.")


def linear_like(m: nn.Module) -> bool:
    """Whether a module computes what an nn.Linear computes, or is an adapter around one."""
    # a parametrized or quantised Linear has another class but keeps this forward
    return type(m).forward is nn.Linear.forward or _adapter(m)


def norm_like(m: nn.Module) -> bool:
    """Whether a module is a norm of the last dimension, an adapter around one, or passes its input on."""
    known = type(m).forward in (nn.LayerNorm.forward, drop_in.LayerNorm.forward)
    return known or rms_norm(m) or layer_norm(m) or type(m) is nn.Identity or _adapter(m)


def rms_norm(m: Any) -> bool:
    """Whether a module is a family's own RMSNorm: a weight and an epsilon, statistics in fp32."""
    kind = type(m)
    own = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.models.")
    return own and m.__dict__.keys() >= {"variance_epsilon"}


def layer_norm(m: Any) -> bool:
    """Whether a module is the first DeBERTa's own LayerNorm, with statistics in fp32."""
    kind = type(m)
    return kind.__name__ == "DebertaLayerNorm" and kind.__module__.startswith(
        "transformers.models."
    )


def tokenwise(m: nn.Module) -> bool:
    """Whether a module computes each token by itself, so that it may run on packed tokens."""
    known = type(m).forward in (nn.Embedding.forward, nn.Dropout.forward)
    return known or linear_like(m) or norm_like(m)


def dropout_like(m: Any) -> bool:
    """Whether a part is a dropout that fastbert can draw itself, or its rate, or none."""
    # some families keep the rate itself, or put an Identity in the place of a dropout of rate 0
    if isinstance(m, float):
        return 0.0 <= m < 1.0
    return m is None or type(m) is nn.Identity or (type(m) is nn.Dropout and 0.0 <= m.p < 1.0)


def elementwise(m: Any) -> bool:
    """Whether an activation, a module or a function, computes each element by itself."""
    if not isinstance(m, nn.Module):
        return m in _FUNCTIONS
    if gelu(m) is not None or type(m).__module__ == "transformers.activations":
        return True
    return type(m) in (nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.ELU, nn.Identity)


def silu(activation: Any) -> bool:
    """Whether an activation is the SiLU."""
    if activation is nn.functional.silu or type(activation) is nn.SiLU:
        return True
    kind = type(activation)
    return kind.__name__ == "SiLUActivation" and kind.__module__ == "transformers.activations"


def gelu(activation: Any) -> str | None:
    """The `approximate` of a GELU, None for any other activation."""
    if type(activation) in (nn.GELU, drop_in.GELU):
        return activation.approximate
    if activation is nn.functional.gelu:
        return "none"
    kind = type(activation)
    return _GELUS.get(kind.__name__) if kind.__module__ == "transformers.activations" else None
