"""The names of settings and weights: tables of ours and Hugging Face's by family, for loading and for saving.

A key of a table of weights is a path of one of our modules; `*` is the layer's number. Three paths on the right are the
projections of queries, keys and values, whose weights, stacked in this order, are our one fused projection.
"""

from __future__ import annotations

import re
from typing import Any

Names = dict[str, str | tuple[str, ...]]

# settings in Hugging Face's spelling -> ours, where they differ
SPELLINGS: dict[str, dict[str, str]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    "lstm": {},
    "gpt2": {
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
        "resid_pdrop": "hidden_dropout_prob",
        "attn_pdrop": "attention_probs_dropout_prob",
        "layer_norm_epsilon": "layer_norm_eps",
    },
    "modernbert": {
        "hidden_activation": "hidden_act",
        "norm_eps": "layer_norm_eps",
        "embedding_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
}
# the number of token types, and the form of the layers, that a family has where nothing else is said
TYPES = {"bert": 2, "roberta": 1, "distilbert": 0, "modernbert": 0, "gpt2": 0, "lstm": 0}
_BERT_FORM = {
    "pre_norm": False,
    "gated": False,
    "biases": True,
    "position_embedding_type": "absolute",
    "local_attention": 0,
}
FORMS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", "distilbert"), _BERT_FORM),
    "gpt2": _BERT_FORM | {"pre_norm": True},
    "lstm": _BERT_FORM | {"position_embedding_type": "none"},
    "modernbert": {
        "pre_norm": True,
        "gated": True,
        "biases": False,
        "position_embedding_type": "rotary",
        "local_attention": 128,
    },
}
# Hugging Face's value of a key that config.json lacks, where it differs from the dataclass's default
HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"vocab_size": 50265, "type_vocab_size": 2},
    "distilbert": {"num_hidden_layers": 6},
    "gpt2": {
        "vocab_size": 50257,
        "max_position_embeddings": 1024,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
    },
    "modernbert": {
        "vocab_size": 50368,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "max_position_embeddings": 8192,
        "pad_token_id": 50283,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
    },
}
# fields of ours that a family's config.json does not have
NOT_WRITTEN = {
    "bert": {"seq_classif_dropout", "qa_dropout"},
    "roberta": {"seq_classif_dropout", "qa_dropout"},
    "distilbert": {"type_vocab_size", "layer_norm_eps", "classifier_dropout"},
    "modernbert": {"type_vocab_size", "seq_classif_dropout", "qa_dropout"},
    "gpt2": {"type_vocab_size", "seq_classif_dropout", "qa_dropout"},
}

_EMBEDDINGS: Names = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
_BERT_ENCODER: Names = _EMBEDDINGS | {
    "layers.*.attention.qkv": tuple(
        f"encoder.layer.*.attention.self.{part}" for part in ("query", "key", "value")
    ),
    "layers.*.attention.out": "encoder.layer.*.attention.output.dense",
    "layers.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.feed_forward.up": "encoder.layer.*.intermediate.dense",
    "layers.*.feed_forward.down": "encoder.layer.*.output.dense",
    "layers.*.output_norm": "encoder.layer.*.output.LayerNorm",
    "final_norm": "encoder.final_norm",
    "pooler": "pooler.dense",
}
_ENCODERS: dict[str, Names] = {
    "bert": _BERT_ENCODER,
    "lstm": _EMBEDDINGS | {"layers.*.lstm": "encoder.layer.*.lstm", "pooler": "pooler.dense"},
    "roberta": _BERT_ENCODER,
    "distilbert": _EMBEDDINGS
    | {
        "layers.*.attention.qkv": tuple(f"transformer.layer.*.attention.{c}_lin" for c in "qkv"),
        "layers.*.attention.out": "transformer.layer.*.attention.out_lin",
        "layers.*.attention_norm": "transformer.layer.*.sa_layer_norm",
        "layers.*.feed_forward.up": "transformer.layer.*.ffn.lin1",
        "layers.*.feed_forward.down": "transformer.layer.*.ffn.lin2",
        "layers.*.output_norm": "transformer.layer.*.output_layer_norm",
    },
    "modernbert": {
        "embeddings.word": "embeddings.tok_embeddings",
        "layers.*.attention.qkv": "layers.*.attn.Wqkv",
        "layers.*.attention.out": "layers.*.attn.Wo",
        "layers.*.attention_norm": "layers.*.attn_norm",
        "layers.*.feed_forward.up": "layers.*.mlp.Wi",
        "layers.*.feed_forward.down": "layers.*.mlp.Wo",
        "layers.*.output_norm": "layers.*.mlp_norm",
        **{name: name for name in ("embeddings.norm", "final_norm")},
    },
    "gpt2": {
        "embeddings.word": "wte",
        "embeddings.position": "wpe",
        "layers.*.attention.qkv": "h.*.attn.c_attn",
        "layers.*.attention.out": "h.*.attn.c_proj",
        "layers.*.attention_norm": "h.*.ln_1",
        "layers.*.feed_forward.up": "h.*.mlp.c_fc",
        "layers.*.feed_forward.down": "h.*.mlp.c_proj",
        "layers.*.output_norm": "h.*.ln_2",
        "final_norm": "ln_f",
    },
}
# the ends of the names of matrices that a family's files hold as (inputs, outputs)
TRANSPOSED = {"gpt2": tuple(f".c_{name}.weight" for name in ("attn", "proj", "fc"))}
# the first part of an encoder's names in a model with a head, where it is not the family's name
_PREFIXES = {"modernbert": "model", "gpt2": "transformer"}
# "mlm_head" alone is the module that holds the decoder's bias
_HEADS: dict[str, Names] = {
    "bert": {
        "mlm_head": "cls.predictions",
        "mlm_head.dense": "cls.predictions.transform.dense",
        "mlm_head.norm": "cls.predictions.transform.LayerNorm",
        "mlm_head.decoder": "cls.predictions.decoder",
        "nsp_head": "cls.seq_relationship",
    },
    "roberta": {
        "mlm_head": "lm_head",
        "mlm_head.dense": "lm_head.dense",
        "mlm_head.norm": "lm_head.layer_norm",
        "mlm_head.decoder": "lm_head.decoder",
        "nsp_head": "cls.seq_relationship",
        "pre_classifier": "classifier.dense",
    },
    "distilbert": {
        "mlm_head": "vocab_projector",
        "mlm_head.dense": "vocab_transform",
        "mlm_head.norm": "vocab_layer_norm",
        "mlm_head.decoder": "vocab_projector",
    },
    "modernbert": {
        "mlm_head": "decoder",
        "mlm_head.dense": "head.dense",
        "mlm_head.norm": "head.norm",
        "mlm_head.decoder": "decoder",
        "head.dense": "head.dense",
        "head.norm": "head.norm",
    },
    "gpt2": {"mlm_head": "lm_head", "mlm_head.decoder": "lm_head"},
}
_HEADS["lstm"] = _HEADS["bert"]
# (family, class) -> names that differ from the rest of the family's
_OWN_NAMES: dict[tuple[str, str], Names] = {
    ("bert", "BertForQuestionAnswering"): {"classifier": "qa_outputs"},
    ("roberta", "BertForQuestionAnswering"): {"classifier": "qa_outputs"},
    ("distilbert", "BertForQuestionAnswering"): {"classifier": "qa_outputs"},
    ("roberta", "BertForSequenceClassification"): {"classifier": "classifier.out_proj"},
    ("gpt2", "BertForSequenceClassification"): {"classifier": "score"},
}


def prefixed(encoder: Names, prefix: str) -> Names:
    """An encoder's table with its prefix on the right and ours on the left."""
    return {
        f"bert.{ours}": f"{prefix}.{theirs}"
        if isinstance(theirs, str)
        else tuple(f"{prefix}.{part}" for part in theirs)
        for ours, theirs in encoder.items()
    }


def prefix_of(family: str) -> str:
    """The first part of the names of an encoder's weights in a model with a head."""
    return _PREFIXES.get(family, family)


def names_of(family: str, name: str) -> Names:
    """The table of a model class in a family: our module -> Hugging Face's, both with the encoder's prefix."""
    encoder = prefixed(_ENCODERS[family], prefix_of(family))
    return {**encoder, **_HEADS[family], **_OWN_NAMES.get((family, name), {})}


def hf_keys(key: str, names: Names) -> list[str]:
    """The Hugging Face keys whose tensors, stacked, are our parameter `key`.

    A key that is in no table, such as a parameter that a subclass adds, keeps its name.
    """
    module, _, leaf = key.rpartition(".")
    layer = re.search(r"\.(\d+)\.", module)
    pattern = module if layer is None else module.replace(layer[0], ".*.")
    theirs = names.get(pattern, pattern)
    parts = [theirs] if isinstance(theirs, str) else theirs
    return [f"{part}.{leaf}".replace("*", layer[1] if layer else "*") for part in parts]
