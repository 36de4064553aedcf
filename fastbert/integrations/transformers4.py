"""The differences of transformers 4.48 to 4.57 from 5, for huggingface.py, which is written for 5.

- transformers 4 rejects unknown keyword arguments. A head's tokens for its model, and the model's Call for its encoder,
  are passed as `head_mask`, which every forward passes on.
- DistilBERT's embeddings take no position ids. So embeddings run on the padded batch; the encoder removes the padding
  and puts it back.
- The encoder records hidden states itself, and a layer returns a tuple.
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
# DistilBERT's names of arguments of its encoder and layer -> the other families' names
_NAMES = {"x": "hidden_states", "attn_mask": "attention_mask"}


class Handed(NamedTuple):
    """A value of ours that is passed as `head_mask`."""

    value: Any


def supported(version: str, oldest: tuple[int, int] = OLDEST) -> bool:
    """Whether this version of transformers is `oldest` or newer."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= oldest


def is_old(stock: Callable[..., Any]) -> bool:
    """Whether a forward is transformers 4's: those of 5 take no head_mask."""
    return "head_mask" in inspect.signature(stock).parameters


def methods(stock: type) -> dict[str, Any]:
    """A get_head_mask for a model class of transformers 4: it passes our value on to the encoder."""

    def get_head_mask(self: Any, head_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(head_mask, Handed):
            sdpa = self.config._attn_implementation == "sdpa"
            return Handed(head_mask.value._replace(sdpa=sdpa))
        return stock.get_head_mask(self, head_mask, *args, **kwargs)  # type: ignore[attr-defined]

    return {"get_head_mask": get_head_mask}


def bridged(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours`, a forward of huggingface.py, with the arguments and outputs of `stock`, a forward of transformers 4."""
    parameters = inspect.signature(stock).parameters
    theirs = {name: old for old, name in _NAMES.items() if old in parameters}

    def called(self: Any, **given: Any) -> Any:
        if "fastbert" in given:
            handed = Handed(given.pop("fastbert"))
            # with the caller's own head_mask the model runs transformers' code anyway
            given.setdefault("head_mask", handed)
        return stock(self, **{theirs.get(name, name): value for name, value in given.items()})

    def forward(self: Any, _: Any, given: dict[str, Any]) -> Any:
        # heads pass on every argument, None where the caller gave none
        given = {_NAMES.get(n, n): value for n, value in given.items() if value is not None}
        if isinstance(given.get("head_mask"), Handed):
            given["fastbert"] = given.pop("head_mask").value
        if hasattr(self, "base_model_prefix"):
            given.setdefault("return_dict", self.config.use_return_dict)
        output = ours(self, called, given)
        return (output,) if isinstance(output, Tensor) else output

    return forward


def encoder(self: Any, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Run all layers; hidden states come and go padded (B, S, C), with zeros at padding."""
    call = given.pop("fastbert", None)
    if call is None:
        return stock(self, **given)
    x, mask = given["hidden_states"], _mask(call, given)
    dtype, packing, states = x.dtype, call.packing, []
    if call.packed:
        x = packing.unpad(x)[None]
    # a layer with this attribute, in later versions, checkpoints itself
    checkpointing = self.training and getattr(self, "gradient_checkpointing", False)
    y = served(self, x, call)
    for i, layer in enumerate(self.layer if y is None else ()):
        if given.get("output_hidden_states"):
            states.append((packing.pad(x[0]) if call.packed else x).to(dtype))
        run = partial(layer, fastbert=call.at(i))
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
    """The attention mask for layers that run transformers' code; the model has made it as for a real head_mask."""
    x, mask = given["hidden_states"], given.get("attention_mask")
    if mask is None or mask.dim() != 2 or not call.sdpa:
        return mask
    # given a head_mask, DistilBERT's model passes the mask on as (B, S), which sdpa does not take
    added = torch.zeros_like(mask, dtype=x.dtype)
    return added.masked_fill(mask == 0, torch.finfo(x.dtype).min)[:, None, None]
