"""The encoder families of transformers that accelerate() knows, as tables of class and attribute names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Parts(NamedTuple):
    """The modules of one encoder layer, whatever its family calls them."""

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


Path = tuple[str, ...]


def _paths(*names: str) -> tuple[Path, ...]:
    return tuple(tuple(name.split(".")) if name else () for name in names)


@dataclass(frozen=True)
class Layout:
    """Where a layer keeps its parts: the ways to them in the order of Parts, and to modules that only hold others."""

    parts: tuple[Path, ...]
    holders: tuple[Path, ...]

    def of(self, layer: nn.Module) -> Parts:
        """The layer's parts as they are now."""
        return Parts(*follow(layer, self.parts))

    def holding(self, layer: nn.Module) -> list[Any]:
        """The modules that only hold others."""
        return follow(layer, self.holders)


def follow(root: Any, paths: tuple[Path, ...]) -> list[Any]:
    """What stands at the end of each way from a module, None for no way and for one that leads nowhere."""
    ends = []
    for path in paths:
        m = root if path else None
        for step in path:
            # nn.Module's own look-up is ten times slower, and every forward asks for every part
            modules = getattr(m, "__dict__", {}).get("_modules", ())
            m = modules[step] if step in modules else getattr(m, step, None)
        ends.append(m)
    return ends


def found(m: Any, name: str) -> Any:
    """The attribute that a dotted name leads to."""
    return follow(m, _paths(name))[0]


@dataclass(frozen=True)
class Family:
    """One modelling file of transformers."""

    module: str
    prefix: str  # of its class names
    layout: Layout
    stack: str  # the model's attribute that holds the layers
    encoder: str  # class names without the prefix
    layer: str
    # what the masked-LM head calls in turn before its decoder; "gelu" is the function
    transform: tuple[str, ...]
    decoder: str
    output: str = "BaseModelOutputWithPastAndCrossAttentions"
    # RoBERTa's positions count the tokens that are not padding, the others' are columns
    counts_tokens: bool = False

    def kind(self, name: str) -> str | None:
        """What a class of this file is to accelerate(), None where it stays as it is."""
        if name in (self.encoder, self.layer):
            return "encoder" if name == self.encoder else "layer"
        if not name.startswith(self.prefix):
            return None
        kind = _KINDS.get(name.removeprefix(self.prefix))
        # ELECTRA's is no masked LM: a classifier of tokens, which minds the attention mask itself
        return None if kind == "pretraining" and self.prefix != "Bert" else kind


_KINDS = {
    "Model": "model",
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "pretraining",
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


def _like_bert(name: str, prefix: str, transform: tuple[str, ...], decoder: str) -> Family:
    return Family(
        f"transformers.models.{name}.modeling_{name}",
        prefix,
        _BERT,
        "encoder",
        f"{prefix}Encoder",
        f"{prefix}Layer",
        transform,
        decoder,
        counts_tokens=transform[0].startswith("lm_head"),
    )


_LM_HEAD = ("lm_head.dense", "gelu", "lm_head.layer_norm"), "lm_head.decoder"

FAMILIES = {
    family.module: family
    for family in (
        _like_bert("bert", "Bert", ("cls.predictions.transform",), "cls.predictions.decoder"),
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
    )
}
