"""The contents of config.json files of every family, as the fields of BertConfig and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastbert.files import quoted
from fastbert.models.names import HF_DEFAULTS, NOT_WRITTEN, SPELLINGS

# model_type -> the family with the same weights and maths; `write` writes the original model_type
ALIASES = {"xlm-roberta": "roberta", "camembert": "roberta"}
# sizes of single layers -> the size that none of them exceeds
LAYER_SIZES = {"layer_heads": "num_attention_heads", "layer_widths": "intermediate_size"}
# settings that no model here has -> the remedy, or why
REFUSED = {
    "quantization_config": "convert the weights back to floating point",
    "is_decoder": "the decoder here is gpt2, and the other families are encoders",
    "add_cross_attention": "fastbert has no cross attention",
}
# the first letters of the model_type of a form that transformers has no model for; the family follows. The file has
# the fields of BertConfig in their own names then
_MIXED = "fastbert-"
# the fields of the form of the layers, which a family's own config.json says in other words or not at all
_FORM = (
    *("pre_norm", "gated", "biases", "local_attention", "global_attn_every_n_layers"),
    *("rope_theta", "local_rope_theta"),
)
# fields that `write` writes one by one
_SPECIAL = (
    "extra",
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
    "position_embedding_type",
    "int8_bits",
    "int8_embeddings",
    "layer_heads",
    "layer_widths",
    "add_pooler",
)
# the value of quantization_config for int8 weights; bits and embeddings are added. It has no quant_method: transformers
# refuses the folder then, while it would draw the weights anew under a method that it does not know
_INT8 = {"library": "fastbert", "layout": 1}
# ModernBERT's settings of biases
_BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")
_KINDS = {"global": "full_attention", "local": "sliding_attention"}
# GPT-2's settings of another attention, with the value that fastbert has
_GPT_ATTENTION = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}


def read(values: Any, fields: Sequence[str]) -> dict[str, Any]:
    """The fields of a BertConfig that a config.json stands for; keys that are no field are in `extra`."""
    if not isinstance(values, dict):
        raise ValueError(f"a configuration is a JSON object, not {type(values).__name__}")
    kind = str(values.get("model_type", "bert"))
    if kind.startswith(_MIXED):
        names: dict[str, str] = {}
        values = {**values, "model_type": kind.removeprefix(_MIXED)}
        ours: dict[str, Any] = {}
    else:
        family = ALIASES.get(kind, kind)
        names = SPELLINGS.get(family, {})
        ours = dict(HF_DEFAULTS.get(family, {}))
        if family == "modernbert":
            values = _from_modernbert(values)
        if family == "gpt2":
            values = _from_gpt2(values)
    extra: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(key, key)
        (ours if name in fields and name != "extra" else extra)[name] = value
    ours |= _int8(extra)
    if kind == "distilbert" and extra.pop("sinusoidal_pos_embds", False):
        ours["position_embedding_type"] = "sinusoidal"
    return {**ours, "extra": extra}


def write(config: Any) -> dict[str, Any]:
    """The config.json of a BertConfig, in the family's own spelling where transformers has such a model."""
    family = config.model_type
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    extra = dict(config.extra)
    values = {name: value for name, value in values.items() if name not in _SPECIAL}
    if config.is_mixed:
        # in the place of an alias's
        extra["model_type"] = _MIXED + extra.get("model_type", family)
        values |= {"add_pooler": config.add_pooler}
        values["position_embedding_type"] = config.position_embedding_type
    else:
        spelling = {ours: theirs for theirs, ours in SPELLINGS[family].items()}
        skipped = {*_FORM, *NOT_WRITTEN[family]}
        values = {spelling.get(k, k): v for k, v in values.items() if k not in skipped}
        values |= _positions(config)
        if config.add_pooler != (family in ("bert", "roberta")):
            values["add_pooler"] = config.add_pooler
        if family == "modernbert":
            values |= _to_modernbert(config)
        if family == "gpt2":
            values["embd_pdrop"] = config.hidden_dropout_prob
    if config.int8_bits is not None:
        about = {"bits": config.int8_bits, "embeddings": config.int8_embeddings}
        values["quantization_config"] = _INT8 | about
    if config.problem_type is not None:
        values["problem_type"] = config.problem_type
    values |= {name: [*sizes] for name in LAYER_SIZES if (sizes := getattr(config, name))}
    # Hugging Face keeps the number of labels only as the length of id2label
    names = config.id2label or {i: f"LABEL_{i}" for i in range(config.num_labels or 0)}
    values["id2label"] = {str(i): name for i, name in names.items()}
    values["label2id"] = config.label2id or {name: i for i, name in names.items()}
    return {**values, **extra}


def _positions(config: Any) -> dict[str, Any]:
    kind = config.position_embedding_type
    if config.model_type == "distilbert":
        return {"sinusoidal_pos_embds": kind == "sinusoidal"}
    return {} if kind in ("absolute", "rotary") else {"position_embedding_type": kind}


def _from_modernbert(values: dict[str, Any]) -> dict[str, Any]:
    """ModernBERT's own settings of biases, local layers and angles as ours.

    Raises ValueError for what no model here has: some biases without the others, layers in another order, rates that
    change with the length, a head with another activation.
    """
    values = dict(values)
    # keys of published files that transformers does not read
    for name in ("position_embedding_type", "layer_norm_eps"):
        values.pop(name, None)
    biases = {name: values.pop(name, False) for name in _BIASES}
    all_or_none = [*biases.values()] in ([True] * len(biases), [False] * len(biases))
    if not all_or_none or values.pop("decoder_bias", True) is not True:
        found = ", ".join(f"{name} is {quoted(value)}" for name, value in biases.items())
        raise ValueError(
            f"{found}: fastbert has these biases all or none, and the decoder's in any case"
        )
    values["biases"] = biases["norm_bias"]
    activation = values.pop("classifier_activation", "gelu")
    if activation != "gelu":
        raise ValueError(f"classifier_activation is {quoted(activation)}: fastbert has gelu")
    return values | _local_layers(values) | _bases(values)


def _from_gpt2(values: dict[str, Any]) -> dict[str, Any]:
    """GPT-2's settings with the width of the feed-forward block filled in.

    Raises ValueError for what no model here has: another attention, two rates of the dropout of hidden states.
    """
    values = dict(values)
    for name, ours in _GPT_ATTENTION.items():
        if values.get(name, ours) != ours:
            raise ValueError(f"{name} is {quoted(values[name])}: fastbert has {quoted(ours)}")
    rates = [values.get(name, 0.1) for name in ("embd_pdrop", "resid_pdrop")]
    values.pop("embd_pdrop", None)
    if rates[0] != rates[1]:
        raise ValueError(
            f"embd_pdrop is {quoted(rates[0])} and resid_pdrop {quoted(rates[1])}: fastbert has one rate for both, "
            "which inference does not use; write it into config.json"
        )
    width = values.get("n_embd", 768)
    if values.get("n_inner") is None and isinstance(width, int):
        values["n_inner"] = 4 * width
    return values


def _bases(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of the bases of rotary angles, whose settings are taken out."""
    given = {name: values.pop(name, None) or {} for name in ("rope_scaling", "rope_parameters")}
    scaled, ropes = given.values()
    found: dict[str, Any] = {}
    for ours, theirs in _KINDS.items():
        rope = ropes.get(theirs) or {} if isinstance(ropes, dict) else None
        if not isinstance(rope, dict) or not isinstance(scaled, dict):
            raise ValueError(f"{str(given)[:200]}: these settings must be JSON objects")
        for settings in (scaled, ropes, rope):
            kind = settings.get("rope_type", settings.get("type", "default"))
            if kind != "default":
                raise ValueError(f"rope_type is {quoted(kind)}: fastbert has default")
        theta = rope.get("rope_theta", values.pop(f"{ours}_rope_theta", None))
        if theta is not None:
            found["rope_theta" if ours == "global" else "local_rope_theta"] = theta
    return found


def _local_layers(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of layers that `layer_types` lists, which is taken out."""
    kinds = values.pop("layer_types", None)
    if not kinds:
        return {}
    known = [*_KINDS.values()]
    if not isinstance(kinds, list) or not all(kind in known for kind in kinds):
        raise ValueError(f"layer_types are {str(kinds)[:100]}: fastbert has {known}")
    layers = values.get("num_hidden_layers", HF_DEFAULTS["modernbert"]["num_hidden_layers"])
    if len(kinds) != layers:
        raise ValueError(f"layer_types lists {len(kinds)} layers and num_hidden_layers is {layers}")
    wide = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    if len(wide) == len(kinds):
        return {"local_attention": 0}
    every = wide[1] if len(wide) > 1 else len(kinds)
    if wide != [*range(0, len(kinds), every)]:
        raise ValueError(
            f"layer_types have full_attention at {str(wide)[:100]}: fastbert has it at "
            "every n-th layer, from the first on"
        )
    return {"global_attn_every_n_layers": every}


def _to_modernbert(config: Any) -> dict[str, Any]:
    kinds = [_KINDS["global" if window is None else "local"] for window in config.windows]
    thetas = {"global": config.rope_theta, "local": config.local_rope_theta}
    values: dict[str, Any] = dict.fromkeys(_BIASES, config.biases)
    return values | {
        "decoder_bias": True,
        "classifier_dropout": config.classifier_p,
        "classifier_activation": "gelu",
        "mlp_dropout": config.hidden_dropout_prob,
        # of no meaning where all layers are global, but transformers divides it
        "local_attention": config.local_attention or 128,
        "layer_types": kinds,
        # what transformers 4 reads in the place of layer_types and rope_parameters
        "global_attn_every_n_layers": config.global_attn_every_n_layers,
        **{f"{name}_rope_theta": theta for name, theta in thetas.items()},
        "rope_parameters": {
            _KINDS[name]: {"rope_type": "default", "rope_theta": theta}
            for name, theta in thetas.items()
        },
    }


def _int8(extra: dict[str, Any]) -> dict[str, Any]:
    """The fields that a quantization_config of fastbert stands for; it is taken out, one of another library stays."""
    found = extra.get("quantization_config")
    if not isinstance(found, dict) or found.get("library") != "fastbert":
        return {}
    if found.get("layout") != _INT8["layout"]:
        raise ValueError(
            f"quantization_config has the layout {quoted(found.get('layout'))} and this version of fastbert reads "
            f"{_INT8['layout']}: quantise the floating-point model again, or update fastbert"
        )
    del extra["quantization_config"]
    return {"int8_bits": found.get("bits") or 0, "int8_embeddings": found.get("embeddings", False)}
