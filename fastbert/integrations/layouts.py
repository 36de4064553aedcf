"""Where the layers of transformers' encoder families have their parts."""

from __future__ import annotations

from dataclasses import replace

from fastbert.integrations import disentangled
from fastbert.integrations.families import Layout, Parts, Path, paths, with_paths

BERT = Layout(
    paths(
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
    paths("attention", "attention.self", "attention.output", "intermediate", "output"),
)
DISTILBERT = Layout(
    paths(
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
    paths("attention", "ffn"),
)
PRE_NORM = replace(
    BERT,
    parts=with_paths(BERT.parts, attention_norm="attention.LayerNorm", output_norm="LayerNorm"),
    pre_norm=True,
)
MPNET = replace(
    BERT,
    parts=with_paths(
        BERT.parts,
        core="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_dropout="attention.attn.dropout",
        out="attention.attn.o",
        out_dropout="attention.dropout",
        attention_norm="attention.LayerNorm",
    ),
    holders=paths("attention", "attention.attn", "intermediate", "output"),
)
ALBERT = Layout(
    with_paths(
        BERT.parts,
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
    paths("attention"),
)
ESM = replace(
    PRE_NORM,
    parts=with_paths(PRE_NORM.parts, attention_dropout="attention.self.dropout", activation=""),
    # queries are scaled before they are turned
    scale=lambda _, size: size**-0.5,
)
DEBERTA = replace(
    BERT,
    parts=with_paths(BERT.parts, query="", key="", value="", fused="attention.self.in_proj"),
    scale=disentangled.scale,
)
DEBERTA_2 = replace(
    DEBERTA,
    parts=with_paths(
        BERT.parts,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
    ),
)


VIT = Layout(
    paths(
        "attention",
        *("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        *("attention.attention_dropout", "attention.o_proj", "dropout", "layernorm_before"),
        *("mlp.fc1", "mlp.activation_fn", "mlp.fc2", "dropout", "layernorm_after"),
    ),
    paths("attention", "mlp"),
    pre_norm=True,
)
CLIP = Layout(
    paths(
        "self_attn",
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *("self_attn.dropout", "self_attn.out_proj", "", "layer_norm1"),
        *("mlp.fc1", "mlp.activation_fn", "mlp.fc2", "", "layer_norm2"),
    ),
    paths("self_attn", "mlp"),
    pre_norm=True,
    scale=lambda core, _: core.scale,
)
VILT = replace(
    PRE_NORM,
    parts=with_paths(
        PRE_NORM.parts,
        core="attention.attention",
        query="attention.attention.query",
        key="attention.attention.key",
        value="attention.attention.value",
        attention_dropout="attention.attention.dropout",
        attention_norm="layernorm_before",
        output_norm="layernorm_after",
    ),
    holders=paths("attention", "attention.attention", "attention.output", "intermediate", "output"),
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
    return paths(*(parts | others).values())


NOMIC = Layout(
    _llama(
        "post_attention_layernorm",
        "post_mlp_layernorm",
        out_dropout="post_attention_dropout",
        down_dropout="post_mlp_dropout",
    ),
    paths("self_attn", "mlp"),
    gated=True,
)
EUROBERT = Layout(
    _llama("input_layernorm", "post_attention_layernorm"),
    paths("self_attn", "mlp"),
    pre_norm=True,
    gated=True,
)
MODERNBERT = Layout(
    paths(
        "attn",
        *("", "", "", "attn.attention_dropout", "attn.Wo", "attn.out_drop"),
        "attn_norm",
        *("mlp.Wi", "mlp.act", "mlp.Wo", "", "mlp_norm", "attn.Wqkv", "", "mlp.drop"),
    ),
    paths("attn", "mlp"),
    pre_norm=True,
    gated=True,
)
