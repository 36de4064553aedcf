"""Subclasses of transformers' models that run on packed tokens, for accelerate().

`fastbert.integrations.huggingface.BertLayer` is a subclass of transformers' BertLayer with another forward. Each class
is made when it is first imported, which unpickling does too. The model's forward removes padding from ids and
positions. transformers' code then runs on a batch of one long sequence (1, T). The encoder passes the bounds of the
sequences to its layers, and puts the padding back as zeros.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.files import quoted
from fastbert.integrations import batch, frozen, heads, layers, transformers4
from fastbert.integrations.families import FAMILIES, Family, Parts
from fastbert.integrations.layers import Call
from fastbert.nn.exports import fx_leaf, refuse_script
from fastbert.nn.packing import Packing
from fastbert.nn.watch import first_hooked, hooked, log_once
from fastbert.ops.context import seed_for

# --- the classes ---

_lock = threading.Lock()


def replacement(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass that replaces exactly this class; None if there is none."""
    family = FAMILIES.get(kind.__module__)
    if family is None or family.kind(kind.__name__) is None:
        return None
    version = importlib.import_module("transformers").__version__
    if not transformers4.supported(version):
        log_once(
            f"accelerate: transformers {version} is older than 4.48: only its torch.nn layers are accelerated"
        )
        return None
    return globals().get(kind.__name__) or _make(family, kind.__name__)


def __getattr__(name: str) -> type[nn.Module]:
    for family in FAMILIES.values():
        if family.kind(name) is not None:
            try:
                return _make(family, name)
            except (ModuleNotFoundError, AttributeError):
                continue  # another version of transformers
    raise AttributeError(f"module {quoted(__name__)} has no attribute {quoted(name)}")


def _make(family: Family, name: str) -> type[nn.Module]:
    stock = getattr(importlib.import_module(family.module), name)
    kind = family.kind(name)
    assert kind is not None
    with _lock:
        if name in globals():
            return globals()[name]
        space = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": stock.__doc__,
            "forward": _forward(stock.forward, _FORWARDS[kind]),
            "fastbert_family": family,
            "fastbert_output": _output(family, kind),
            "fastbert_old": transformers4.is_old(stock.forward),
            "__prepare_scriptable__": refuse_script,
        }
        if kind == "encoder":
            space["fastbert_copies"] = frozen.FrozenLayers
        if kind == "model":
            space["fastbert_at_padding"] = "auto"
            space["fastbert_arguments"] = batch.arguments_read(family, stock.forward)
            if space["fastbert_old"]:
                space |= transformers4.methods(stock)
        if hasattr(stock, "is_custom_code"):
            # so transformers initialises and converts weights as for its own classes
            space["is_custom_code"] = classmethod(lambda cls: False)
        made = type(stock)(name, (stock,), space)
        _register_recorders(made)
        globals()[name] = made
    return made


def _output(family: Family, kind: str) -> Any:
    """The output class of those forwards of ours that make their output themselves; None for the others."""
    names = {
        "encoder": family.output,
        "masked_lm": "MaskedLMOutput",
        "pretraining": f"{family.prefix}ForPreTrainingOutput",
    }
    return getattr(importlib.import_module(family.module), names[kind]) if kind in names else None


def _forward(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A method with the signature of `stock`, transformers' forward: it calls `ours` with arguments by name."""
    parameters = list(inspect.signature(stock).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if transformers4.is_old(stock):
        ours = transformers4.bridged(stock, transformers4.encoder if ours is _encoder else ours)

    @wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers' code raises the error of too many arguments, and serves a method kept from before restore()
        if len(args) > len(names) or not hasattr(type(self), "fastbert_family"):
            return stock(self, *args, **kwargs)
        return ours(self, stock, dict(zip(names, args, strict=False), **kwargs))

    # torch.fx looks into the forwards of transformers 4 with proxies of its own
    return forward if transformers4.is_old(stock) else fx_leaf(forward)


def _register_recorders(made: Any) -> None:
    """Enter a class into transformers' register of recordable outputs, whose keys are the classes' paths."""
    for name in ("output_capturing", "generic"):  # the newer module first
        try:
            register = importlib.import_module(f"transformers.utils.{name}")._CAN_RECORD_REGISTRY
        except (ImportError, AttributeError):
            continue
        if getattr(made, "_can_record_outputs", None):
            dict.__setitem__(register, str(made), made._can_record_outputs)
        return


# --- the model ---


def _model(self: Any, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The encoder model's forward: on packed tokens, or transformers' code with one logged sentence."""
    wanted = given.pop("fastbert", "all")
    if wanted is None:
        return stock(self, **given)
    reason = batch.why_not_packed(self, given)
    packing: Packing | None = None
    if reason is None:
        indices = batch.indices_of(self, given)
        reason = batch.why_not_these_shapes(self, given)
    if reason is None:
        packing, tokens, reason = batch.packing_of(self, given, indices)
    if packing is None:
        log_once(f"accelerate: {type(self).__name__} runs transformers' code: {reason}")
        return stock(self, **given)
    values = heads.values(given)
    family = self.fastbert_family
    parts = tuple(family.layout.of(layer) for layer in getattr(self, family.stack).layer)
    # one seed for the whole forward: layers that are recomputed in backward must draw the same masks. None is drawn
    # where nothing is dropped: the user's next random numbers are those of an unaccelerated run
    dropped = max(max(layers.rates(m)) for m in parts) if self.training else 0.0
    seed = seed_for(dropped, None, values)
    reason = _why_not_packed_between_layers(self, parts)
    call = Call(packing, seed, reason is None, parts=parts, tokens=tokens)
    if reason is not None:
        log_once(f"accelerate: {type(self).__name__} takes padding out layer by layer: {reason}")
        return stock(self, **given, fastbert=call)
    if not given.get("output_hidden_states", getattr(self.config, "output_hidden_states", False)):
        call = _narrowed(self, call, wanted, values)._replace(states_unused=True)
    if self.fastbert_old:  # transformers4.encoder packs
        return stock(self, **given, fastbert=call)
    as_dict = given.pop("return_dict", getattr(self.config, "return_dict", True))
    shape = values.shape[:2]
    given["position_ids"] = batch.positions(self, given, shape)
    for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
        if given.get(name) is not None:
            given[name] = packing.unpad(given[name])[None]
    given["attention_mask"] = None
    output = stock(self, **given, return_dict=True, fastbert=call)
    if output.get("hidden_states"):
        output["hidden_states"] = tuple(_padded(h, output, packing) for h in output.hidden_states)
    return output.to_tuple() if as_dict is False else output


def _narrowed(self: Any, call: Call, wanted: str | Tensor, values: Tensor) -> Call:
    """The call for the tokens that a head reads: "all", "first" of each sequence, or positions in the flat (B * S)."""
    packing = call.packing
    if (isinstance(wanted, str) and wanted == "all") or hooked(self):
        return call
    pooler = self._modules.get("pooler")
    if pooler is not None and (
        type(pooler).__module__ != self.fastbert_family.module or hooked(pooler)
    ):
        return call
    if isinstance(wanted, str):
        tokens = values.shape[:2].numel() if packing.rows is None else packing.rows.shape[0]
        return call._replace(rows=packing.starts(tokens), firsts=True)
    wanted = wanted.to(values.device)
    rows = wanted if packing.rows is None else torch.searchsorted(packing.rows, wanted)
    return call._replace(rows=rows)


def _padded(hidden: Tensor | None, output: Any, packing: Packing) -> Tensor | None:
    # the last hidden state is the output itself; states that were not requested are None
    if hidden is None or hidden is output.last_hidden_state:
        return hidden
    return packing.pad(hidden[0])


def _why_not_packed_between_layers(self: Any, parts: tuple[Parts, ...]) -> str | None:
    """Why hidden states must pass from layer to layer as (B, S, C): other code sees them there."""
    family = self.fastbert_family
    stack = getattr(self, family.stack)
    embeddings = self.embeddings
    if type(embeddings).__module__ != family.module:
        return f"the embeddings are a {type(embeddings).__name__}"
    inputs = list(embeddings.modules())
    if (project := self._modules.get("embeddings_project")) is not None:
        inputs.append(project)
    for m in inputs[1:]:
        if not layers.tokenwise(m):
            return f"the embeddings hold a {type(m).__name__}"
    stacked = list(stack.layer)
    seen = first_hooked((*inputs, stack, *stacked), *layers.RECORDERS, layers.SHARDING)
    if seen is not None:
        name = "encoder" if seen is stack else "embeddings"
        name = f"layer {stacked.index(seen)}" if seen in stacked else name
        return f"hooks are attached to the {name}"
    for i, layer in enumerate(stacked):
        if reason := layers.why_not_packed(layer, parts[i], family.layout, family.module):
            return f"layer {i} runs transformers' code: {reason}"
    return None


# --- the encoder and its layers ---


def _encoder(self: Any, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Run all layers on hidden states (1, T, C), or (B, S, C) unless call.packed; the output is zero at padding."""
    call = given.pop("fastbert", None)
    if call is None:
        return stock(self, **given)
    x, mask = given.pop("hidden_states"), given.pop("attention_mask", None)
    given.pop("use_cache", None)
    dtype = x.dtype
    y = frozen.served(self, x, call)
    for i, layer in enumerate(self.layer if y is None else ()):
        x = layer(x, mask, fastbert=call.at(i, last=i == len(self.layer) - 1), **given)
    x = x if y is None else y
    x = call.padded(x[0] if call.packed else call.packing.unpad(x))
    # under autocast layers compute in autocast's dtype, while transformers' output has the embeddings' dtype
    return self.fastbert_output(last_hidden_state=x.to(dtype))


def _layer(self: Any, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    call = given.pop("fastbert", None)
    if call is None:
        return stock(self, **given)
    x = given["hidden_states"]
    if call.packed:
        return layers.run(call.parts[0], x[0], call)[None]
    family = self.fastbert_family
    # a hook on another module may have changed this layer since the forward began
    parts = family.layout.of(self)
    if layers.why_not_packed(self, parts, family.layout, family.module):
        return stock(self, **given)
    packing = call.packing
    return packing.pad(layers.run(parts, packing.unpad(x), call))


_FORWARDS = {
    "model": _model,
    "encoder": _encoder,
    "layer": _layer,
    "masked_lm": heads.masked_lm,
    "pretraining": heads.pretraining,
    "question_answering": heads.question_answering,
    "token_labels": heads.token_labels,
    "first_token": heads.first_token,
}
