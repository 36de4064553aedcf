"""What accelerate() has to know of an encoder family of transformers: names of classes and paths to a layer's parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn


class Parts(NamedTuple):
    """The modules of one encoder layer, under the same names for every family."""

    core: Any  # has the head size, the scale and the training flag of attention
    query: Any
    key: Any
    value: Any
    attention_dropout: Any
    out: Any
    out_dropout: Any  # None where the family has none
    attention_norm: Any
    up: Any
    activation: Any
    down: Any
    down_dropout: Any
    output_norm: Any
    fused: Any = None  # one projection in the place of query, key and value
    gate: Any = None  # the activated half of a gated feed-forward; None: `up` gives both halves
    inner_dropout: Any = None  # between the feed-forward's products


Path = tuple[str, ...]


def paths(*names: str) -> tuple[Path, ...]:
    """Dotted names as paths; an empty name is an empty path."""
    return tuple(tuple(name.split(".")) if name else () for name in names)


def with_paths(parts: tuple[Path, ...], **changes: str) -> tuple[Path, ...]:
    """The paths with those of some parts replaced, by the parts' names."""
    named = dict(zip(Parts._fields, parts, strict=False))
    named |= zip(changes, paths(*changes.values()), strict=True)
    return tuple(named.values())


@dataclass(frozen=True)
class Layout:
    """Attribute paths from a layer: to its parts, in the order of Parts, and to modules that only hold others."""

    parts: tuple[Path, ...]
    holders: tuple[Path, ...]
    pre_norm: bool = False  # norms stand before the blocks, not after their sums
    gated: bool = False  # the feed-forward multiplies two halves
    # the scale of attention scores, of the layer's core and the head size, where the core's `scaling` is another number
    scale: Callable[[Any, int], float] | None = None

    # the names of the parts that such layers do not have; made at once, since torch.compile can't trace a cache
    absent: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        known = dict(zip(Parts._fields, self.parts, strict=False))
        absent = frozenset(name for name in Parts._fields if not known.get(name))
        object.__setattr__(self, "absent", absent)

    def of(self, layer: nn.Module) -> Parts:
        """The layer's parts as they are now."""
        return Parts(*follow(layer, self.parts))

    def holding(self, layer: nn.Module) -> list[Any]:
        """The modules that only hold others."""
        return follow(layer, self.holders)


def follow(root: Any, paths: tuple[Path, ...]) -> list[Any]:
    """The object at the end of each path from `root`; None for an empty path and for one that does not exist."""
    ends = []
    for path in paths:
        m = root if path else None
        for step in path:
            # looked up here since nn.Module's own __getattr__ is slow, and every forward looks up every part
            modules = getattr(m, "__dict__", {}).get("_modules", ())
            m = modules[step] if step in modules else getattr(m, step, None)
        ends.append(m)
    return ends


def module_at(m: Any, name: str) -> Any:
    """The module at a dotted name, such as "lm_head.decoder"; None if there is none."""
    return follow(m, paths(name))[0]


@dataclass(frozen=True)
class Family:
    """One modelling file of transformers."""

    module: str
    prefix: str  # the beginning of its models' class names
    layout: Layout
    stack: str  # the model's attribute that holds the layers; "": the model itself
    encoder: str  # class names; no encoder where the model itself holds the layers
    layer: str
    # the modules that the masked-LM head calls before its decoder, in order; "gelu" is torch's function
    transform: tuple[str, ...]
    decoder: str
    output: str = "BaseModelOutputWithPastAndCrossAttentions"
    # RoBERTa's position ids count the tokens that are not padding; other families' are column numbers
    counts_tokens: bool = False
    embeddings: str = "embeddings"  # the model's attribute
    positions: bool = True  # False: the embeddings read no position ids
    # True: embeddings look at the whole padded batch, and are computed before padding is removed
    padded_embeddings: bool = False
    # a function of the model and its arguments, for batches that hold images: images.py. Where it is given, the model's
    # own code runs its embeddings on the padded batch, and the holder of the layers takes the padding out
    sequence: Callable[[Any, dict[str, Any]], dict[str, Any] | str] | None = None
    causal: tuple[str, ...] = ()  # classes of models whose tokens see those before them only
    # classes of models that read their outputs in the last column, which may be padding
    reads_last: tuple[str, ...] = ()
    layers: str = "layer"  # the stack's attribute
    # a function of the stack: its layers in the order in which they run; None: each runs once
    order: Callable[[Any], list[nn.Module]] | None = None
    first: str = ""  # the stack's module before its layers
    last: str = ""  # the stack's norm behind its layers
    # the stack's module, or None, behind its first layer: it takes the layer's input, its output and a mask
    behind_first: str = ""
    rotary: str = ""  # the model's attribute that holds the rates of rotary positions
    bias: str = ""  # the stack's table of biases of relative positions (T5's buckets)
    # scores have terms of content and position, and the embeddings are multiplied by the mask (DeBERTa)
    disentangled: bool = False
    per_token: tuple[str, ...] = ()  # arguments of the model (B, S, ...) beside those of BERT
    others: tuple[str, ...] = ()  # arguments that only the embeddings or `sequence` read
    # the model's norm behind its encoder: what it computes at padding is set to zero
    end: str = ""
    # the kinds of attention masks that the model takes as a dict; it makes no mask of a kind that is None there
    masks: tuple[str, ...] = ()
    # True: without a mask the model warns of ids that may be padding, and makes a mask of ones
    warns: bool = False
    passes: bool = True  # False: the model's forward leaves out arguments that it does not know
    # other kinds than those of _KINDS
    kinds: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    # the oldest version of transformers whose code of this family fastbert serves
    oldest: tuple[int, int] = (4, 48)

    def reads_distances(self, model: Any) -> bool:
        """Whether attention reads the tokens' distances: sequences must stand in the first columns."""
        if self.disentangled:
            return self.stack_of(model).relative_attention
        return bool(self.rotary or self.bias)

    def stack_of(self, model: nn.Module) -> Any:
        """The module that holds the layers, the model itself or its encoder."""
        return getattr(model, self.stack) if self.stack else model

    def layers_of(self, stack: Any) -> list[nn.Module]:
        """A stack's layers in the order in which they run; shared ones are there several times."""
        return list(getattr(stack, self.layers)) if self.order is None else self.order(stack)

    def kind(self, name: str) -> str | None:
        """The kind of forward that accelerate() gives a class of this file; None if the class stays unchanged."""
        if name in (self.encoder, self.layer):
            return "encoder" if name == self.encoder else "layer"
        if not name.startswith(self.prefix):
            return None
        name = name.removeprefix(self.prefix)
        return self.kinds[name] if name in self.kinds else _KINDS.get(name)


_KINDS = {
    "Model": "model",
    "ForMaskedLM": "masked_lm",
    "ForQuestionAnswering": "question_answering",
    "ForSequenceClassification": "first_token",
    "ForMultipleChoice": "first_token",
    "ForNextSentencePrediction": "first_token",
    "ForTokenClassification": "token_labels",
    "ForCausalLM": "token_labels",
    "LMHeadModel": "token_labels",
}
