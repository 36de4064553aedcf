"""The encoder families of transformers that accelerate() knows, as a table of class and attribute names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastbert.integrations import disentangled
from fastbert.integrations.families import Family, Layout, Parts, Path, paths, with_paths

_BERT = Layout(
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
_DISTILBERT = Layout(
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


_PRE_NORM = replace(
    _BERT,
    parts=with_paths(_BERT.parts, attention_norm="attention.LayerNorm", output_norm="LayerNorm"),
    pre_norm=True,
)
_MPNET = replace(
    _BERT,
    parts=with_paths(
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
    holders=paths("attention", "attention.attn", "intermediate", "output"),
)
_ALBERT = Layout(
    with_paths(
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
    paths("attention"),
)
_ESM = replace(
    _PRE_NORM,
    parts=with_paths(_PRE_NORM.parts, attention_dropout="attention.self.dropout", activation=""),
    # queries are scaled before they are turned
    scale=lambda _, size: size**-0.5,
)

_DEBERTA = replace(
    _BERT,
    parts=with_paths(
        _BERT.parts,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
    ),
    scale=disentangled.scale,
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


_NOMIC = Layout(
    _llama(
        "post_attention_layernorm",
        "post_mlp_layernorm",
        out_dropout="post_attention_dropout",
        down_dropout="post_mlp_dropout",
    ),
    paths("self_attn", "mlp"),
    gated=True,
)
_EUROBERT = Layout(
    _llama("input_layernorm", "post_attention_layernorm"),
    paths("self_attn", "mlp"),
    pre_norm=True,
    gated=True,
)
_MODERNBERT = Layout(
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


def _like_bert(
    name: str, prefix: str, transform: tuple[str, ...], decoder: str, **others: Any
) -> Family:
    kind: dict[str, Any] = {
        "layout": _BERT,
        "stack": "encoder",
        "encoder": f"{prefix}Encoder",
        "layer": f"{prefix}Layer",
        "counts_tokens": transform[0].startswith("lm_head"),
    }
    return Family(
        f"transformers.models.{name.removesuffix('_text')}.modeling_{name}",
        prefix,
        transform=transform,
        decoder=decoder,
        **(kind | others),
    )


def _first_layers(stack: Any) -> list[nn.Module]:
    """The layers that a model of a smaller config.num_hidden_layers than its list runs."""
    return list(stack.layers[: stack.config.num_hidden_layers])


def _flat(name: str, prefix: str, layout: Layout, **others: Any) -> Family:
    """A family whose models hold their layers themselves and turn queries and keys by their positions."""
    kind: dict[str, Any] = {
        "stack": "",
        "encoder": "",
        "layer": f"{prefix}Layer",
        "layers": "layers",
        "positions": False,
        "rotary": "rotary_emb",
        "order": _first_layers,
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
            "ernie",
            "Ernie",
            *_PREDICTIONS,
            kinds={"ForPreTraining": "pretraining"},
            per_token=("task_type_ids",),
            **_SINCE_5,
        ),
        _like_bert("data2vec_text", "Data2VecText", *_LM_HEAD, **_SINCE_5),
        _like_bert(
            "splinter",
            "Splinter",
            *_PREDICTIONS,
            output="BaseModelOutput",
            kinds={"ForQuestionAnswering": None},
            warns=True,
            **_SINCE_5,
        ),
        _like_bert(
            "markuplm",
            "MarkupLM",
            *_PREDICTIONS,
            output="BaseModelOutput",
            counts_tokens=True,
            per_token=("xpath_tags_seq", "xpath_subs_seq"),
            warns=True,
            **_SINCE_5,
        ),
        _like_bert(
            "roberta_prelayernorm",
            "RobertaPreLayerNorm",
            *_LM_HEAD,
            layout=replace(
                _PRE_NORM,
                parts=with_paths(_PRE_NORM.parts, output_norm="intermediate.LayerNorm"),
            ),
            end="LayerNorm",
            **_SINCE_5,
        ),
        _like_bert(
            "megatron_bert",
            "MegatronBert",
            *_PREDICTIONS,
            layout=replace(
                _PRE_NORM,
                parts=with_paths(_PRE_NORM.parts, attention_norm="attention.ln", output_norm="ln"),
            ),
            last="ln",
            passes=False,
            kinds={"ForPreTraining": "pretraining"},
            warns=True,
            **_SINCE_5,
        ),
        _like_bert(
            "xlm_roberta_xl",
            "XLMRobertaXL",
            *_LM_HEAD,
            layout=replace(
                _PRE_NORM,
                parts=with_paths(
                    _PRE_NORM.parts,
                    attention_norm="attention.self_attn_layer_norm",
                    down_dropout="",
                ),
            ),
            last="LayerNorm",
            **_SINCE_5,
        ),
        _flat(
            "jina_embeddings_v3",
            "JinaEmbeddingsV3",
            replace(
                _NOMIC,
                parts=with_paths(
                    _NOMIC.parts,
                    up="mlp.fc1",
                    gate="",
                    activation="mlp.activation_fn",
                    down="mlp.fc2",
                ),
                gated=False,
            ),
            transform=_LM_HEAD[0],
            decoder=_LM_HEAD[1],
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
        _like_bert(
            "deberta_v2",
            "DebertaV2",
            *_PREDICTIONS,
            layout=_DEBERTA,
            disentangled=True,
            behind_first="conv",
            passes=False,
            output="BaseModelOutput",
            warns=True,
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
            order=None,
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
