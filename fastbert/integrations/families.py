"""The encoder families of transformers that accelerate() knows, as tables of class and attribute names."""

from __future__ import annotations

from dataclasses import dataclass
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


Path = tuple[str, ...]


def _paths(*names: str) -> tuple[Path, ...]:
    return tuple(tuple(name.split(".")) if name else () for name in names)


@dataclass(frozen=True)
class Layout:
    """Attribute paths from a layer: to its parts, in the order of Parts, and to modules that only hold others."""

    parts: tuple[Path, ...]
    holders: tuple[Path, ...]

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
    stack: str  # the model's attribute that holds the layers
    encoder: str  # class names
    layer: str
    # the modules that the masked-LM head calls before its decoder, in order; "gelu" is torch's function
    transform: tuple[str, ...]
    decoder: str
    output: str = "BaseModelOutputWithPastAndCrossAttentions"
    # RoBERTa's position ids count the tokens that are not padding; other families' are column numbers
    counts_tokens: bool = False

    def kind(self, name: str) -> str | None:
        """The kind of forward that accelerate() gives a class of this file; None if the class stays unchanged."""
        if name in (self.encoder, self.layer):
            return "encoder" if name == self.encoder else "layer"
        if not name.startswith(self.prefix):
            return None
        kind = _KINDS.get(name.removeprefix(self.prefix))
        # ElectraForPreTraining is no masked LM: it classifies tokens, and applies the attention mask itself
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
