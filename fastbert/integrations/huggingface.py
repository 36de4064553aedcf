"""Subclasses of transformers' models that run on packed tokens, for accelerate().

`fastbert.integrations.huggingface.BertLayer` is a subclass of transformers' BertLayer with another forward. Each class
is made when it is first imported, which unpickling does too. The model's forward removes padding from ids and
positions. transformers' code then runs on a batch of one long sequence (1, T). The layers get the bounds of the
sequences. The encoder, or the model where it has none, puts the padding back as zeros.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.files import quoted
from fastbert.integrations import (
    batch,
    disentangled,
    forms,
    frozen,
    heads,
    layers,
    recognise,
    transformers4,
)
from fastbert.integrations.families import Family, Parts
from fastbert.integrations.handing import handing, taken
from fastbert.integrations.known_families import FAMILIES
from fastbert.integrations.layers import Call, Whole
from fastbert.nn.attention_maps import Maps
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
    if not transformers4.supported(version, family.oldest):
        oldest = ".".join(map(str, family.oldest))
        log_once(
            f"accelerate: transformers {version} is older than {oldest}: its {family.prefix} models are not accelerated"
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
        if kind == ("encoder" if family.encoder else "model"):
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
    family = self.fastbert_family
    wanted = given.pop("fastbert", "all") if family.passes else taken("all")
    if wanted is None:
        return stock(self, **given)
    seen = given if family.sequence is None else family.sequence(self, given)
    packing, tokens, stacked, reason = batch.packing(self, given, seen)
    if packing is None or isinstance(seen, str):
        return _stock(self, stock, given, reason)
    maps = Maps(packing) if batch.maps_wanted(self, given) else None
    values = heads.values(seen)
    parts = tuple(family.layout.of(layer) for layer in stacked)
    # one seed for the whole forward: layers that are recomputed in backward must draw the same masks. None is drawn
    # where nothing is dropped: the user's next random numbers are those of an unaccelerated run
    dropped = max(max(layers.rates(m)) for m in parts) if self.training else 0.0
    seed = seed_for(dropped, None, values)
    reason = _why_not_packed_between_layers(self, stacked, parts)
    call = Call(
        family,
        packing,
        seed,
        reason is None,
        stacked=tuple(stacked),
        parts=parts,
        forms=forms.forms(family, self, stacked, parts, packing),
        relative=disentangled.relative(family, self, packing),
        numbers=None if family.encoder else {id(layer): i for i, layer in enumerate(stacked)},
        tokens=tokens,
        whole=None if family.encoder or vars(self).get("frozen") is None else Whole(self),
        observer=maps,
    )
    if reason is not None and maps is not None:
        return _stock(self, stock, given, f"output_attentions is set, and {reason}")
    if reason is not None:
        log_once(f"accelerate: {type(self).__name__} takes padding out layer by layer: {reason}")
        return _stock_with(call, self, stock, given)
    if not batch.states_wanted(self, given):
        call = _narrowed(self, call, wanted, values)._replace(states_unused=maps is None)
    if self.fastbert_old:  # transformers4.encoder packs
        return stock(self, **given, fastbert=call)
    as_dict = given.pop("return_dict", getattr(self.config, "return_dict", True))
    given = given if family.sequence is not None else _packed(self, given, packing)
    given["return_dict"] = True
    output = call.shown(_stock_with(call, self, stock, given))
    if maps is not None:
        # in the place of the empty tuple of transformers' recorders
        output["attentions"] = tuple(maps.found)
    return output if as_dict else output.to_tuple()


def _stock(self: Any, stock: Callable[..., Any], given: dict[str, Any], reason: str | None) -> Any:
    """transformers' forward, with the reason for it logged once."""
    copies = vars(self.fastbert_family.stack_of(self)).get("frozen")
    level = logging.INFO if getattr(copies, "bits", None) is None else logging.WARNING
    log_once(f"accelerate: {type(self).__name__} runs transformers' code: {reason}", level)
    return stock(self, **given)


def _stock_with(call: Call, self: Any, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    """transformers' forward of the model, whose encoder or layers get the call."""
    if self.fastbert_family.passes:
        return stock(self, **given, fastbert=call)
    with handing(call):
        return stock(self, **given)


def _packed(self: Any, given: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """The arguments of transformers' forward for a batch of one sequence (1, T)."""
    family = self.fastbert_family
    if family.padded_embeddings and given.get("inputs_embeds") is None:
        read = {n: given.pop(n, None) for n in ("input_ids", "position_ids")}
        given["inputs_embeds"] = self.embeddings(**read, attention_mask=given.get("attention_mask"))
    elif family.positions:
        given["position_ids"] = batch.positions(self, given, heads.values(given).shape[:2])
    names = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", *family.per_token)
    for name in names:
        if given.get(name) is not None:
            given[name] = packing.unpad(given[name])[None]
    mask: Any = dict.fromkeys(family.masks) if family.masks else None
    if family.warns and given.get("attention_mask") is not None:
        mask = torch.ones(1, packing.tokens, dtype=torch.long, device=heads.values(given).device)
    given["attention_mask"] = mask
    return given


def _narrowed(self: Any, call: Call, wanted: str | Tensor, values: Tensor) -> Call:
    """The call for the tokens that a head reads: "all", "first" of each sequence, or positions in the flat (B * S)."""
    packing, family = call.packing, self.fastbert_family
    if (isinstance(wanted, str) and wanted == "all") or hooked(self):
        return call
    behind_first = family.stack_of(self)._modules.get(family.behind_first)
    if len(call.parts) == 1 and behind_first is not None:
        return call
    pooler = self._modules.get("pooler")
    if pooler is not None and (type(pooler).__module__ != family.module or hooked(pooler)):
        return call
    if isinstance(wanted, str):
        return call._replace(rows=packing.starts(packing.tokens), firsts=True)
    wanted = wanted.to(values.device)
    rows = wanted if packing.rows is None else torch.searchsorted(packing.rows, wanted)
    return call._replace(rows=rows)


def _why_not_packed_between_layers(
    self: Any, stacked: list[nn.Module], parts: tuple[Parts, ...]
) -> str | None:
    """Why hidden states must pass from layer to layer as (B, S, C): other code sees them there."""
    family = self.fastbert_family
    stack, embeddings = family.stack_of(self), getattr(self, family.embeddings)
    inputs = []
    if not family.padded_embeddings and family.sequence is None:
        if type(embeddings).__module__ != family.module and type(embeddings) is not nn.Embedding:
            return f"the embeddings are a {type(embeddings).__name__}"
        inputs = list(embeddings.modules())
        if (project := self._modules.get("embeddings_project")) is not None:
            inputs.append(project)
        for m in inputs[type(embeddings) is not nn.Embedding :]:
            own = type(m) is nn.ModuleList or type(m).__module__ == family.module
            if not (own or recognise.tokenwise(m) or recognise.elementwise(m)):
                return f"the embeddings hold a {type(m).__name__}"
    beside = [stack._modules.get(name) for name in (family.first, family.last)]
    ends = [m for m in beside if m is not None]
    for m in ends:
        if not recognise.tokenwise(m):
            return f"beside the layers is a {type(m).__name__}"
    holders = [stack] if family.encoder else []
    seen = first_hooked(
        (*inputs, *holders, *ends, *stacked), *recognise.RECORDERS, recognise.SHARDING
    )
    if seen is not None:
        name = "encoder" if seen is stack else "embeddings"
        name = "norm beside the layers" if any(seen is m for m in ends) else name
        name = f"layer {stacked.index(seen)}" if seen in stacked else name
        return f"hooks are attached to the {name}"
    for i, layer in enumerate(stacked):
        if reason := layers.why_not_packed(layer, parts[i], family):
            return f"layer {i} runs transformers' code: {reason}"
    return None


# --- the encoder and its layers ---


def _encoder(self: Any, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Run all layers on hidden states (1, T, C), or (B, S, C) unless call.packed; the output is zero at padding."""
    family = self.fastbert_family
    call = given.pop("fastbert", None) if family.passes else taken(None)
    if call is None:
        return stock(self, **given)
    name = "hidden_states" if "hidden_states" in given else "inputs_embeds"
    x, mask = given.pop(name), given.pop("attention_mask", None)
    given.pop("use_cache", None)
    # only encoders that record hidden states themselves get these arguments
    states: list[Tensor] | None = [] if given.pop("output_hidden_states", False) else None
    given.pop("return_dict", None)
    dtype = x.dtype
    if family.sequence is not None and call.packed:
        x = call.packing.unpad(x)[None]
    if family.first:
        x = getattr(self, family.first)(x)
    if family.bias and not call.packed:
        given["position_bias"] = self.compute_position_bias(x)
    if family.disentangled and not call.packed:
        mask = self.get_attention_mask(mask)
        given |= {"relative_pos": self.get_rel_pos(x), "rel_embeddings": self.get_rel_embedding()}
    conv = self._modules.get(family.behind_first)
    y = frozen.served(self, x, call)
    for i, layer in enumerate(call.stacked if y is None else ()):
        if states is not None and not call.states_unused:
            states.append(x)
        before = x if i == 0 and conv is not None else None
        x = layer(x, mask, fastbert=call.at(i), **given)
        x = x[0] if isinstance(x, tuple) else x
        if before is not None:
            x = _convolved(conv, before, x, call)
    x = x if y is None else y
    if family.last and (norm := getattr(self, family.last)) is not None:
        x = norm(x)
    # under autocast layers compute in autocast's dtype, while transformers' output has the embeddings' dtype
    x = call.padded(x[0] if call.packed else call.packing.unpad(x)).to(dtype)
    shown = {} if states is None else {"hidden_states": (*states, x)}
    return self.fastbert_output(last_hidden_state=x, **shown)


def _convolved(conv: Any, before: Tensor, x: Tensor, call: Call) -> Tensor:
    """The stack's module of a layer's input and output, which reads tokens beside a token: run on the padded batch."""
    packing = call.packing
    if call.packed:
        before, x = packing.pad(before[0]), packing.pad(x[0])
    mask = packing.pad(torch.ones(packing.tokens, dtype=torch.long, device=x.device))
    y = conv(before, x, mask)
    return packing.unpad(y)[None] if call.packed else y


def _layer(self: Any, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    call = given.pop("fastbert", None)
    if call is None:
        return stock(self, **given)
    x, family = given["hidden_states"], self.fastbert_family
    done = None
    if call.numbers is not None:  # the model's own code runs its layers
        number = call.numbers[id(self)]
        if family.sequence is not None and call.packed and number == 0:
            x = call.packing.unpad(x)[None]
        done, call = frozen.served_by(call, number, x), call.at(number)
    if call.packed:
        y = layers.run(call.parts[0], x[0], call) if done is None else done[0]
        # NomicBERT's pooler reads the last layer's output next, and needs it padded
        ends = call.last and not family.encoder and not family.last
        return call.padded(y).to(x.dtype) if ends else y[None]
    # a hook on another module may have changed this layer since the forward began
    parts = family.layout.of(self)
    if layers.why_not_packed(self, parts, family):
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
    "joined_labels": heads.joined_labels,
    "first_token": heads.first_token,
}
