"""What transformers 4.48 to 4.57 do differently from 5, for huggingface.py, which knows 5 only.

There no forward takes arguments it doesn't know, so what accelerate()'s head tells its model, and the model its
encoder, goes in the place of `head_mask`: every forward hands that on. The embeddings of 4 can't be told a token's
position in all families: they run on the padded batch, and the encoder takes the padding out and puts it back. The
encoder records hidden states itself, and a layer returns a tuple.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.integrations.frozen import served
from fastbert.integrations.layers import Call

OLDEST = (4, 48)
# how DistilBERT's encoder and layer call their first arguments
_NAMES = {"x": "hidden_states", "attn_mask": "attention_mask"}


class Handed(NamedTuple):
    """A value of ours in the place of a head_mask."""

    value: Any


def supported(version: str) -> bool:
    """Whether accelerate() knows the models of this version of transformers."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= OLDEST


def is_old(stock: Callable[..., Any]) -> bool:
    """Whether a forward is one of transformers 4: 5 has no head_mask."""
    return "head_mask" in inspect.signature(stock).parameters


def methods(stock: type) -> dict[str, Any]:
    """What a model's class of transformers 4 gets besides its forward: what was handed in goes on to the encoder."""

    def get_head_mask(self: Any, head_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(head_mask, Handed):
            sdpa = self.config._attn_implementation == "sdpa"
            return Handed(head_mask.value._replace(sdpa=sdpa))
        return stock.get_head_mask(self, head_mask, *args, **kwargs)  # type: ignore[attr-defined]

    return {"get_head_mask": get_head_mask}


def bridged(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """One of huggingface.py's forwards, for a forward of transformers 4."""
    parameters = inspect.signature(stock).parameters
    theirs = {name: old for old, name in _NAMES.items() if old in parameters}

    def called(self: Any, **given: Any) -> Any:
        if "fastbert" in given:
            handed = Handed(given.pop("fastbert"))
            # with the caller's own head_mask the model runs transformers' code anyway
            given.setdefault("head_mask", handed)
        return stock(self, **{theirs.get(name, name): value for name, value in given.items()})

    def forward(self: Any, _: Any, given: dict[str, Any]) -> Any:
        # heads pass every argument on, as None where there is none
        given = {_NAMES.get(n, n): value for n, value in given.items() if value is not None}
        if isinstance(given.get("head_mask"), Handed):
            given["fastbert"] = given.pop("head_mask").value
        if hasattr(self, "base_model_prefix"):
            given.setdefault("return_dict", self.config.use_return_dict)
        output = ours(self, called, given)
        return (output,) if isinstance(output, Tensor) else output

    return forward


def encoder(self: Any, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    """All layers; takes padded hidden states (B, S, C) and gives them, zeros at padding."""
    call = given.pop("fastbert", None)
    if call is None:
        return stock(self, **given)
    x, mask = given["hidden_states"], _mask(call, given)
    dtype, packing, states = x.dtype, call.packing, []
    if call.packed:
        x = packing.unpad(x)[None]
    # later versions' layers do it themselves
    checkpointing = self.training and getattr(self, "gradient_checkpointing", False)
    y = served(self, x, call)
    for i, layer in enumerate(self.layer if y is None else ()):
        if given.get("output_hidden_states"):
            states.append((packing.pad(x[0]) if call.packed else x).to(dtype))
        run = partial(layer, fastbert=call.at(i, last=i == len(self.layer) - 1))
        if checkpointing and not hasattr(layer, "gradient_checkpointing"):
            x = self._gradient_checkpointing_func(run, x, mask)[0]
        else:
            x = run(x, mask)[0]
    x = x if y is None else y
    x = call.padded(x[0] if call.packed else packing.unpad(x)).to(dtype)
    shown = (*states, x) if states else None
    output = self.fastbert_output(last_hidden_state=x, hidden_states=shown)
    return output if given.get("return_dict", True) else output.to_tuple()


def _mask(call: Call, given: dict[str, Any]) -> Tensor | None:
    """The mask for layers of transformers' own, which the model has made as for a real head_mask."""
    x, mask = given["hidden_states"], given.get("attention_mask")
    if mask is None or mask.dim() != 2 or not call.sdpa:
        return mask
    # with a head_mask DistilBERT's model leaves (B, S) to its attention, which sdpa doesn't take
    added = torch.zeros_like(mask, dtype=x.dtype)
    return added.masked_fill(mask == 0, torch.finfo(x.dtype).min)[:, None, None]
