"""The encoder families of transformers that accelerate() knows, as a table of class and attribute names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastbert.integrations import images
from fastbert.integrations.families import Family, Layout, with_paths
from fastbert.integrations.layouts import (
    ALBERT,
    BERT,
    CLIP,
    DEBERTA,
    DEBERTA_2,
    DISTILBERT,
    ESM,
    EUROBERT,
    MODERNBERT,
    MPNET,
    NOMIC,
    PRE_NORM,
    VILT,
    VIT,
)

_LM_HEAD = ("lm_head.dense", "gelu", "lm_head.layer_norm"), "lm_head.decoder"
_PREDICTIONS = ("cls.predictions.transform",), "cls.predictions.decoder"
_SINCE_5: dict[str, Any] = {"oldest": (5, 0)}


def _like_bert(
    name: str, prefix: str, transform: tuple[str, ...], decoder: str, **others: Any
) -> Family:
    kind: dict[str, Any] = {
        "layout": BERT,
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


def _deberta(name: str, prefix: str, layout: Layout, **others: Any) -> Family:
    kind: dict[str, Any] = {
        "layout": layout,
        "disentangled": True,
        "passes": False,
        "output": "BaseModelOutput",
        "warns": True,
    }
    return _like_bert(name, prefix, *_PREDICTIONS, **(kind | _SINCE_5 | others))


def _towers(name: str, prefix: str, **others: Any) -> Family:
    """A family with one model of images and one of text, whose layers are of one class."""
    kind: dict[str, Any] = {
        "stack": "encoder",
        "encoder": f"{prefix}Encoder",
        "layer": f"{prefix}EncoderLayer",
        "layers": "layers",
        "transform": (),
        "decoder": "",
        "output": "BaseModelOutput",
        "positions": False,
        "others": ("pixel_values", "interpolate_pos_encoding"),
        "kinds": {"Model": None, "TextModel": "model", "VisionModel": "model"},
        "oldest": (5, 0),
    }
    return Family(f"transformers.models.{name}.modeling_{name}", prefix, CLIP, **(kind | others))


def _albert_order(stack: Any) -> list[nn.Module]:
    """ALBERT's layers: the groups take turns of equal length."""
    config = stack.config
    each = config.num_hidden_layers / config.num_hidden_groups
    groups = (stack.albert_layer_groups[int(i / each)] for i in range(config.num_hidden_layers))
    return [layer for group in groups for layer in group.albert_layers]


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
            DISTILBERT,
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
                PRE_NORM,
                parts=with_paths(PRE_NORM.parts, output_norm="intermediate.LayerNorm"),
            ),
            end="LayerNorm",
            **_SINCE_5,
        ),
        _like_bert(
            "megatron_bert",
            "MegatronBert",
            *_PREDICTIONS,
            layout=replace(
                PRE_NORM,
                parts=with_paths(PRE_NORM.parts, attention_norm="attention.ln", output_norm="ln"),
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
                PRE_NORM,
                parts=with_paths(
                    PRE_NORM.parts,
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
                NOMIC,
                parts=with_paths(
                    NOMIC.parts,
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
            layout=ESM,
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
            layout=MPNET,
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
            layout=ALBERT,
            encoder="AlbertTransformer",
            order=_albert_order,
            first="embedding_hidden_mapping_in",
            kinds={"ForPreTraining": "token_labels"},
            output="BaseModelOutput",
            **_SINCE_5,
        ),
        _like_bert(
            "layoutlm",
            "LayoutLM",
            *_PREDICTIONS,
            output="BaseModelOutput",
            per_token=("bbox",),
            warns=True,
            **_SINCE_5,
        ),
        _flat(
            "vit",
            "ViT",
            VIT,
            transform=(),
            decoder="",
            rotary="",
            order=None,
            kinds={"ForImageClassification": "first_token"},
            sequence=images.tower("embeddings.patch_embeddings.projection", first=1),
            others=("pixel_values", "bool_masked_pos", "interpolate_pos_encoding"),
        ),
        _towers(
            "clip",
            "CLIP",
            causal=("CLIPTextModel",),
            sequence=images.tower("embeddings.patch_embedding", first=1),
        ),
        _towers(
            "siglip",
            "Siglip",
            reads_last=("SiglipTextModel",),
            sequence=images.tower("embeddings.patch_embedding", first=0),
        ),
        _like_bert(
            "vilt",
            "Vilt",
            ("",),
            "",
            layout=VILT,
            sequence=images.vilt,
            positions=False,
            others=("pixel_values", "pixel_mask", "image_token_type_idx"),
            passes=False,
            output="BaseModelOutput",
            kinds={
                "ForMaskedLM": "token_labels",
                "ForQuestionAnswering": "first_token",
                "ForImageAndTextRetrieval": "first_token",
            },
            **_SINCE_5,
        ),
        _like_bert(
            "visual_bert",
            "VisualBert",
            *_PREDICTIONS,
            sequence=images.visual_bert,
            positions=False,
            others=(
                "visual_embeds",
                "visual_attention_mask",
                "visual_token_type_ids",
                "image_text_alignment",
            ),
            passes=False,
            output="BaseModelOutput",
            kinds={
                "ForPreTraining": "joined_labels",
                "ForQuestionAnswering": None,
                "ForVisualReasoning": "first_token",
            },
            **_SINCE_5,
        ),
        _deberta("deberta", "Deberta", DEBERTA),
        _deberta("deberta_v2", "DebertaV2", DEBERTA_2, behind_first="conv"),
        _flat(
            "modernbert",
            "ModernBert",
            MODERNBERT,
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
            NOMIC,
            transform=("cls.predictions.transform",),
            decoder="cls.predictions.decoder",
        ),
        _flat(
            "eurobert",
            "EuroBert",
            EUROBERT,
            layer="EuroBertDecoderLayer",
            transform=(),
            decoder="lm_head",
            embeddings="embed_tokens",
            last="norm",
        ),
    )
}
