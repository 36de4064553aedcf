"""How accelerate()'s forward of an encoder model reads its arguments: whether, and how, the batch can be packed."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.files import quoted
from fastbert.integrations import forms, heads
from fastbert.integrations.families import Family
from fastbert.nn.packing import Packing, find_tokens
from fastbert.nn.watch import log_once, why_not_bypassed

# arguments that the packed path serves
_KNOWN = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "use_cache",
    # only the loss reads it
    "num_items_in_batch",
}


def arguments_read(family: Family, forward: Callable[..., Any]) -> frozenset[str]:
    """The arguments that transformers' code of a model may read, with eager or sdpa attention; it ignores all others.

    Empty for transformers 4, whose forwards refuse other arguments.
    """
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values()):
        return frozenset()
    generic = importlib.import_module("transformers.utils.generic")
    attention = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    eager = getattr(importlib.import_module(family.module), "eager_attention_forward", None)
    names = {"softcap", "output_cross_attentions"}  # read by name from **kwargs
    for function in filter(None, (forward, eager, attention.get("sdpa"))):
        parameters = inspect.signature(function).parameters.values()
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    for declared in ("TransformersKwargs", "FlashAttentionKwargs"):
        names |= getattr(getattr(generic, declared, None), "__annotations__", {}).keys()
    return frozenset(names)


def why_not_packed(self: Any, given: dict[str, Any], seen: dict[str, Any]) -> str | None:
    """Why the encoder must run transformers' code; reads no tensor's values.

    `seen` are the arguments as a batch of one kind of tokens: `given`, or as Family.sequence returns them.
    """
    config, family = self.config, self.fastbert_family
    for name in ("is_decoder", "add_cross_attention", "is_causal"):
        if getattr(config, name, False):
            return f"config.{name} is set"
    if getattr(config, "summary_type", "first") != "first":
        return f"summary_type {quoted(config.summary_type)} reads outputs at padding"
    if maps_wanted(self, given) and (reason := _why_not_maps(self, given)):
        return f"output_attentions is set, and {reason}"
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if implementation not in ("eager", "sdpa") and "flash_attention" not in implementation:
        return f"the attention implementation is {quoted(implementation)}"
    for name, value in given.items():
        known = name in _KNOWN or name in family.per_token or name in family.others
        if known or value is None or value is False:
            continue
        read = self.fastbert_arguments
        if name in read or not read or "flash" in implementation:
            return f"the argument {name} is not known to the packed path"
    ids, embeds = seen.get("input_ids"), seen.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return "one of input_ids and inputs_embeds must be given"
    values, dims = (embeds, 3) if ids is None else (ids, 2)
    if not isinstance(values, Tensor) or values.dim() != dims:
        return "the batch is not (B, S)"
    if values.device.type == "meta":
        return "the tensors are on meta"
    mask = seen.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return "attention_mask is not (B, S)"
    if given.get("position_ids") is not None and "flash" in implementation:
        return "position_ids may mark packed sequences for flash attention"
    if reason := forms.why_not(family, self, given):
        return reason
    return why_not_bypassed()


def maps_wanted(self: Any, given: dict[str, Any]) -> bool:
    """Whether the caller asks for attention weights."""
    wanted = given.get("output_attentions")
    return bool(getattr(self.config, "output_attentions", False) if wanted is None else wanted)


def states_wanted(self: Any, given: dict[str, Any]) -> bool:
    """Whether a call's arguments, or the model's config where they say nothing, ask for hidden states."""
    wanted = given.get("output_hidden_states")
    return bool(getattr(self.config, "output_hidden_states", False) if wanted is None else wanted)


def _why_not_maps(self: Any, given: dict[str, Any]) -> str | None:
    """Why attention weights can't be rebuilt beside the kernels' work."""
    if self.fastbert_old:
        return "transformers 4 is installed"
    if self.fastbert_family.disentangled:
        return "the attention has terms of positions, whose log-sum-exps are not kept"
    if self.training:
        return "training shows the weights after dropout"
    if torch.is_grad_enabled():
        leaves = [*self.parameters(), *(t for t in given.values() if isinstance(t, Tensor))]
        if any(t.requires_grad for t in leaves):
            return "a gradient may go through the weights: call the model under torch.no_grad()"
    return "torch.compile traces the model" if torch.compiler.is_compiling() else None


def why_not_these_shapes(self: Any, given: dict[str, Any], stacked: list[nn.Module]) -> str | None:
    """Why these shapes need transformers' code. After indices_of: torch.compile would make one more graph before it."""
    shape = heads.values(given).shape[:2]
    if shape.numel() == 0:
        return "the batch is empty"
    mask, types, positions = map(given.get, ("attention_mask", "token_type_ids", "position_ids"))
    if mask is not None and mask.shape != shape:
        return "attention_mask is not (B, S)"
    if types is not None and types.shape != shape:
        return f"token_type_ids has shape {tuple(types.shape)}, not {tuple(shape)}"
    for name in self.fastbert_family.per_token:
        if (t := given.get(name)) is not None and t.shape[:2] != shape:
            return f"{name} has shape {tuple(t.shape)}, not {tuple(shape)} and more"
    if positions is not None and positions.shape not in (shape, (1, shape[1])):
        return f"position_ids has shape {tuple(positions.shape)}, not {tuple(shape)}"
    family = self.fastbert_family
    if positions is None and family.positions:
        _check_length(self, given, shape[1])
    if not stacked:
        return "it has no layers"
    ours = (family.stack_of(self), *stacked)
    if any(getattr(type(m), "fastbert_family", None) is not family for m in ours):
        return "its layers are not accelerated: call fastbert.accelerate(model) again"
    return None


def _check_length(self: Any, given: dict[str, Any], length: int) -> None:
    """Refuse a batch (B, length) that needs more positions than the model has."""
    table = getattr(self.embeddings, "position_embeddings", None)
    if table is None:
        return
    longest, ids = getattr(table, "num_embeddings", length), given.get("input_ids")
    if self.fastbert_family.counts_tokens:
        # the positions of tokens begin after the padding's
        longest -= self.embeddings.padding_idx + 1
        if length > longest and ids is not None:
            length = int((ids != self.embeddings.padding_idx).sum(1).max())
    if length > longest:
        raise ValueError(
            f"the batch is {length} tokens long but the model has {longest} positions: truncate it"
        )


def indices_of(self: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """The result of find_tokens, None without a mask; one host sync, and torch.compile's only graph break."""
    mask, device = given.get("attention_mask"), heads.values(given).device
    if mask is None:
        return None
    mask = mask if mask.device == device else mask.to(device)
    family = self.fastbert_family
    binary = self.fastbert_old or family.disentangled
    reading = "heads4" if binary else "heads"
    if family.reads_distances(self):
        reading = "binary_beginnings" if binary else "beginnings"
    ids, padding_id = given.get("input_ids"), getattr(self.config, "pad_token_id", None)
    if self.fastbert_at_padding != "auto" or ids is None or padding_id is None:
        return find_tokens(mask, reading)
    # a masked position with another id is no padding: ColBERT scores the outputs of masked [MASK] tokens
    return find_tokens(mask, reading, ids, padding_id)


def packing(
    self: Any, given: dict[str, Any], seen: dict[str, Any] | str
) -> tuple[Packing | None, Tensor | None, list[nn.Module], str | None]:
    """What packing_of returns, and the layers, where nothing else makes transformers' code run.

    `seen` is Family.sequence's.
    """
    if isinstance(seen, str):
        return None, None, [], seen
    if reason := why_not_packed(self, given, seen):
        return None, None, [], reason
    indices = indices_of(self, seen)
    family = self.fastbert_family
    stacked = family.layers_of(family.stack_of(self))
    if reason := why_not_these_shapes(self, seen, stacked):
        return None, None, [], reason
    packing, tokens, reason = packing_of(self, seen, indices)
    if tokens is not None and maps_wanted(self, given):
        return None, None, [], "output_attentions is set, and outputs at padding are wanted"
    return packing, tokens, stacked, reason


def packing_of(
    self: Any, given: dict[str, Any], indices: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Packing | None, Tensor | None, str | None]:
    """(packing, tokens, None), or (None, None, why the batch cannot be packed).

    `tokens` (B, S) is True at tokens where outputs at padding must be transformers', and nothing is packed then; it is
    None where they are zeros.
    """
    values = heads.values(given)
    full = (values.shape[0], values.shape[1], values.device)
    if indices is None:
        return Packing.full(*full), None, None
    packing, wrong = Packing.found(indices, values.shape[1])
    family = self.fastbert_family
    other = ", or a mask is not of 0 and 1" if self.fastbert_old or family.disentangled else ""
    if wrong and family.reads_distances(self):
        moved = "a mask has holes or begins with padding"
        return None, None, f"attention reads the distances of tokens, and {moved}{other}"
    if wrong:
        return None, None, f"a sequence begins with padding, which transformers' heads read{other}"
    _, rows, sizes = indices
    if sizes.shape[2]:
        log_once(
            f"accelerate: {type(self).__name__} computes masked positions too, as transformers does, since some hold "
            f"other ids than config.pad_token_id {self.config.pad_token_id}: set it to the padding's id, or call "
            'accelerate(model, at_padding="zeros") if their outputs are not used',
            logging.WARNING,
        )
    elif not _padding_wanted(self) or rows.shape[0] == values.shape[:2].numel():
        return packing, None, None
    if family.disentangled:
        return None, None, "outputs at padding are asked for, and disentangled attention has none"
    return Packing.full(*full), (given["attention_mask"] != 0).to(values.device), None


def _padding_wanted(self: Any) -> bool:
    """Whether outputs at padding must be transformers', by the user's choice or since the model reads them."""
    return (
        self.fastbert_at_padding == "stock"
        or type(self).__name__ in self.fastbert_family.reads_last
    )


def positions(self: Any, given: dict[str, Any], shape: torch.Size) -> Tensor:
    """(B, S) rows of the position table, numbered as in transformers."""
    positions = given.get("position_ids")
    if positions is not None:
        return positions.expand(shape)
    embeddings, ids = self.embeddings, given.get("input_ids")
    device = (given["inputs_embeds"] if ids is None else ids).device
    if not self.fastbert_family.counts_tokens:
        return torch.arange(shape[1], device=device).expand(shape)
    if ids is None:
        return torch.arange(shape[1], device=device).expand(shape) + embeddings.padding_idx + 1
    token = (ids != embeddings.padding_idx).long()
    return token.cumsum(1) * token + embeddings.padding_idx
