"""The encoder families of transformers that accelerate() knows, as tables of class and attribute names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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


def _paths(*names: str) -> tuple[Path, ...]:
    return tuple(tuple(name.split(".")) if name else () for name in names)


def _at(parts: tuple[Path, ...], **paths: str) -> tuple[Path, ...]:
    """The paths with those of some parts replaced, by the parts' names."""
    named = dict(zip(Parts._fields, parts, strict=False))
    named |= zip(paths, _paths(*paths.values()), strict=True)
    return tuple(named.values())


@dataclass(frozen=True)
class Layout:
    """Attribute paths from a layer: to its parts, in the order of Parts, and to modules that only hold others."""

    parts: tuple[Path, ...]
    holders: tuple[Path, ...]
    pre_norm: bool = False  # norms stand before the blocks, not after their sums
    gated: bool = False  # the feed-forward multiplies two halves
    # the scale of attention scores, of the head size, where the layer's own `scaling` is another number
    scale: Callable[[int], float] | None = None

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
    return follow(m, _paths(name))[0]


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
    layers: str = "layer"  # the stack's attribute
    order: Callable[[Any], list[nn.Module]] | None = (
        None  # the stack's layers as they run; None: each once
    )
    first: str = ""  # the stack's module before its layers
    last: str = ""  # the stack's norm behind its layers
    rotary: str = ""  # the model's attribute that holds the rates of rotary positions
    bias: str = ""  # the stack's table of biases of relative positions (T5's buckets)
    masks: tuple[
        str, ...
    ] = ()  # the kinds of attention masks that the model takes by name, None: it makes none
    passes: bool = True  # False: the model's forward leaves out arguments that it does not know
    # other kinds than those of _KINDS
    kinds: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    oldest: tuple[int, int] = (4, 48)  # the oldest transformers whose code of this file is known

    @property
    def relative(self) -> bool:
        """Whether attention reads the tokens' distances: sequences must stand in the first columns."""
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

_BERT = Layout(
    _paths(
        "attention.self",
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.self.dropout",
        "attention.output.dense",
        "attention.output.dropout",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "intermediate.intermediate_act_fn",
        "output.dense",
        "output.dropout",
        "output.LayerNorm",
    ),
    _paths("attention", "attention.self", "attention.output", "intermediate", "output"),
)
_DISTILBERT = Layout(
    _paths(
        "attention",
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.dropout",
        "attention.out_lin",
        "",
        "sa_layer_norm",
        "ffn.lin1",
        "ffn.activation",
        "ffn.lin2",
        "ffn.dropout",
        "output_layer_norm",
    ),
    _paths("attention", "ffn"),
)


_PRE_NORM = replace(
    _BERT,
    parts=_at(_BERT.parts, attention_norm="attention.LayerNorm", output_norm="LayerNorm"),
    pre_norm=True,
)
_MPNET = replace(
    _BERT,
    parts=_at(
        _BERT.parts,
        core="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_dropout="attention.attn.dropout",
        out="attention.attn.o",
        out_dropout="attention.dropout",
        attention_norm="attention.LayerNorm",
    ),
    holders=_paths("attention", "attention.attn", "intermediate", "output"),
)
_ALBERT = Layout(
    _at(
        _BERT.parts,
        core="attention",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_dropout="attention.attention_dropout",
        out="attention.dense",
        out_dropout="attention.output_dropout",
        attention_norm="attention.LayerNorm",
        up="ffn",
        activation="activation",
        down="ffn_output",
        down_dropout="",
        output_norm="full_layer_layer_norm",
    ),
    _paths("attention"),
)
_ESM = replace(
    _PRE_NORM,
    parts=_at(_PRE_NORM.parts, attention_dropout="attention.self.dropout", activation=""),
    # queries are scaled before they are turned
    scale=lambda size: size**-0.5,
)


def _llama(attention_norm: str, output_norm: str, **others: str) -> tuple[Path, ...]:
    """The parts of a layer whose modules have Llama's names."""
    parts = dict.fromkeys(Parts._fields, "") | {
        "core": "self_attn",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_dropout": "self_attn.attention_dropout",
        "out": "self_attn.o_proj",
        "attention_norm": attention_norm,
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "activation": "mlp.act_fn",
        "down": "mlp.down_proj",
        "output_norm": output_norm,
    }
    return _paths(*(parts | others).values())


_NOMIC = Layout(
    _llama(
        "post_attention_layernorm",
        "post_mlp_layernorm",
        out_dropout="post_attention_dropout",
        down_dropout="post_mlp_dropout",
    ),
    _paths("self_attn", "mlp"),
    gated=True,
)
_EUROBERT = Layout(
    _llama("input_layernorm", "post_attention_layernorm"),
    _paths("self_attn", "mlp"),
    pre_norm=True,
    gated=True,
)
_MODERNBERT = Layout(
    _paths(
        "attn",
        *("", "", "", "attn.attention_dropout", "attn.Wo", "attn.out_drop"),
        "attn_norm",
        *("mlp.Wi", "mlp.act", "mlp.Wo", "", "mlp_norm", "attn.Wqkv", "", "mlp.drop"),
    ),
    _paths("attn", "mlp"),
    pre_norm=True,
    gated=True,
)


def _like_bert(
    name: str, prefix: str, transform: tuple[str, ...], decoder: str, **others: Any
) -> Family:
    kind = {
        "layout": _BERT,
        "stack": "encoder",
        "encoder": f"{prefix}Encoder",
        "layer": f"{prefix}Layer",
        "counts_tokens": transform[0].startswith("lm_head"),
    }
    return Family(
        f"transformers.models.{name}.modeling_{name.removesuffix('_text')}",
        prefix,
        transform=transform,
        decoder=decoder,
        **(kind | others),
    )


def _flat(name: str, prefix: str, layout: Layout, **others: Any) -> Family:
    """A family whose models hold their layers themselves and turn queries and keys by their positions."""
    kind = {
        "stack": "",
        "encoder": "",
        "layer": f"{prefix}Layer",
        "layers": "layers",
        "positions": False,
        "rotary": "rotary_emb",
        "oldest": (5, 0),
    }
    return Family(f"transformers.models.{name}.modeling_{name}", prefix, layout, **(kind | others))


def _albert_order(stack: Any) -> list[nn.Module]:
    """ALBERT's layers: the groups take turns of equal length."""
    config = stack.config
    each = config.num_hidden_layers / config.num_hidden_groups
    groups = (stack.albert_layer_groups[int(i / each)] for i in range(config.num_hidden_layers))
    return [layer for group in groups for layer in group.albert_layers]


_LM_HEAD = ("lm_head.dense", "gelu", "lm_head.layer_norm"), "lm_head.decoder"
_PREDICTIONS = ("cls.predictions.transform",), "cls.predictions.decoder"
_SINCE_5: dict[str, Any] = {"oldest": (5, 0)}

FAMILIES = {
    family.module: family
    for family in (
        _like_bert("bert", "Bert", *_PREDICTIONS, kinds={"ForPreTraining": "pretraining"}),
        _like_bert("roberta", "Roberta", *_LM_HEAD),
        _like_bert("xlm_roberta", "XLMRoberta", *_LM_HEAD),
        _like_bert("camembert", "Camembert", *_LM_HEAD),
        _like_bert("electra", "Electra", ("generator_predictions",), "generator_lm_head"),
        Family(
            "transformers.models.distilbert.modeling_distilbert",
            "DistilBert",
            _DISTILBERT,
            "transformer",
            "Transformer",
            "TransformerBlock",
            ("vocab_transform", "activation", "vocab_layer_norm"),
            "vocab_projector",
            output="BaseModelOutput",
        ),
        _like_bert(
            "esm",
            "Esm",
            *_LM_HEAD,
            layout=_ESM,
            padded_embeddings=True,
            last="emb_layer_norm_after",
            rotary="rotary_embeddings",
            output="BaseModelOutputWithCrossAttentions",
            # its decoder's bias is a parameter of the head
            kinds={"ForMaskedLM": "token_labels"},
            **_SINCE_5,
        ),
        _like_bert(
            "mpnet",
            "MPNet",
            *_LM_HEAD,
            layout=_MPNET,
            bias="relative_attention_bias",
            passes=False,
            output="BaseModelOutput",
            **_SINCE_5,
        ),
        _like_bert(
            "albert",
            "Albert",
            ("predictions.dense", "predictions.activation", "predictions.LayerNorm"),
            "predictions.decoder",
            layout=_ALBERT,
            encoder="AlbertTransformer",
            order=_albert_order,
            first="embedding_hidden_mapping_in",
            kinds={"ForPreTraining": "token_labels"},
            output="BaseModelOutput",
            **_SINCE_5,
        ),
        _flat(
            "modernbert",
            "ModernBert",
            _MODERNBERT,
            layer="ModernBertEncoderLayer",
            transform=("head",),
            decoder="decoder",
            last="final_norm",
            masks=("full_attention", "sliding_attention"),
        ),
        _flat(
            "nomic_bert",
            "NomicBert",
            _NOMIC,
            transform=("cls.predictions.transform",),
            decoder="cls.predictions.decoder",
        ),
        _flat(
            "eurobert",
            "EuroBert",
            _EUROBERT,
            layer="EuroBertDecoderLayer",
            transform=(),
            decoder="lm_head",
            embeddings="embed_tokens",
            last="norm",
        ),
    )
}
