"""The model that follows from a run's settings and its tokenizer, and the checks of a new run.

The checks need no torch, so that the command line can make them before it imports torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.models.config import BertConfig, model_folder
from fastbert.pretrain.captions import read_captions
from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.recipes import OF_IMAGES
from fastbert.train.settings import check_length_said

if TYPE_CHECKING:
    from fastbert.models.decoder import GPTForCausalLM
    from fastbert.models.heads import BertForMaskedLM, BertForPreTraining


def build_model(
    config: PretrainConfig, tokenizer: Any
) -> BertForPreTraining | BertForMaskedLM | GPTForCausalLM:
    """A fresh model, or the one in `init_from`. Raises ValueError when tokenizer, sizes and recipe do not fit."""
    from fastbert.data import SpecialIds, vocabulary
    from fastbert.models.decoder import GPTForCausalLM
    from fastbert.models.heads import BertForMaskedLM, BertForPreTraining
    from fastbert.pretrain.initial import start_with_neighbours

    kind: Any = BertForPreTraining if config.next_sentence else BertForMaskedLM
    if config.recipe == "gpt":
        kind = GPTForCausalLM
    if config.init_from is None:
        special = SpecialIds.of(tokenizer)
        sizes = model_config(config, len(vocabulary(tokenizer)), special.pad)
        if config.recipe == "modern":
            # transformers' own defaults lie outside of a small vocabulary
            first, last = ("bos", "cls"), ("eos", "sep")
            sizes.extra |= {f"{name}_token_id": special.cls for name in first}
            sizes.extra |= {f"{name}_token_id": special.sep for name in last}
        if config.recipe == "gpt":
            sizes.extra |= {f"{name}_token_id": special.sep for name in ("bos", "eos")}
        model = kind(sizes)
        if config.start == "neighbours":
            start_with_neighbours(model.bert)
        return model
    loaded: Any = kind.from_pretrained(
        config.init_from,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
    )
    _check_loaded(loaded.config, config, len(vocabulary(tokenizer)))
    return loaded


def check_usable(config: PretrainConfig, out: Path) -> None:
    """The checks of a new run that read nothing but the config.json of `init_from`."""
    if config.images is not None:
        _check_images(config)
        return
    if not config.sources:
        raise ValueError("sources is empty: name the text to train on, or - for standard input")
    for source in config.sources:
        if source != "-" and Path(source).resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(
                f"--out {out} lies inside the source {source}, whose files are all read: move it"
            )
    check_length_said(config.to_dict())
    if config.init_from is None:
        model_config(config, config.vocab_size, pad=0)
    else:
        _check_loaded(BertConfig.from_file(model_folder(config.init_from)), config, 0)
    config.check_paths()


# {recipe: the model_type of its model}, where their names differ
_FAMILIES = {"modern": "modernbert", "gpt": "gpt2", **dict.fromkeys(OF_IMAGES, "bert")}


def model_config(config: PretrainConfig, vocab_size: int, pad: int) -> BertConfig:
    """The sizes of a fresh model; raises ValueError where they do not fit together."""
    roberta, modern = config.recipe == "roberta", config.recipe == "modern"
    gpt = config.recipe == "gpt"
    assert config.ffn is not None
    assert config.max_position is not None
    assert config.dropout is not None
    assert config.attention_dropout is not None
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        # RoBERTa counts positions from pad + 1
        max_position_embeddings=config.max_position + (pad + 1 if roberta else 0),
        position_embedding_type=config.positions,
        initializer_range=config.initializer_range,
        pre_norm=config.pre_norm,
        gated=config.gated,
        biases=config.biases,
        local_attention=config.local_attention,
        global_attn_every_n_layers=config.global_every,
        rope_theta=config.rope_theta,
        local_rope_theta=config.local_rope_theta,
        model_type=_FAMILIES.get(config.recipe, config.recipe),
        hidden_act="gelu_new" if gpt else "gelu",
        pad_token_id=None if gpt else pad,
        layer_norm_eps=1e-5 if roberta or modern or gpt else 1e-12,
        # None: the family's
        add_pooler=True if config.next_sentence else None,
        type_vocab_size=2 if config.next_sentence else None,
    )


def encoder_config(
    config: PretrainConfig, vocab_size: int, pad: int, image: bool = False
) -> BertConfig:
    """The sizes of an encoder: of both in a single stream, of texts or of an `image` in two towers."""
    stream = config.recipe == "single-stream"
    found = model_config(config, vocab_size, pad)
    found = replace(found, add_pooler=stream, type_vocab_size=2 if stream else 0)
    if not image:
        return found
    return replace(
        found,
        num_hidden_layers=config.image_layers or 0,
        # the positions are those of patches
        max_position_embeddings=1,
        position_embedding_type="absolute",
    )


def _check_images(config: PretrainConfig) -> None:
    """The checks of a new run on images, but for their decoding."""
    check_length_said(config.to_dict())
    config.check_paths()
    encoder_config(config, config.vocab_size, 0)
    for folder in (config.images, config.eval_images):
        if folder is not None:
            read_captions(folder)


def _check_loaded(loaded: BertConfig, config: PretrainConfig, vocabulary: int) -> None:
    """Raise ValueError where the model in `init_from` does not fit the settings and the size of the vocabulary."""
    if loaded.causal != (config.recipe == "gpt"):
        raise ValueError(
            f"the model in {config.init_from} is a {loaded.model_type} and recipe is {config.recipe}: the recipe gpt "
            "trains a gpt2, and the others do not"
        )
    if loaded.recurrent != (config.recipe == "lstm"):
        raise ValueError(
            f"the model in {config.init_from} is a {loaded.model_type} and recipe is {config.recipe}: the recipe lstm "
            "trains an lstm, and the others do not"
        )
    if reason := loaded.why_not_trained:
        raise ValueError(f"the model in {config.init_from} {reason}")
    if vocabulary > loaded.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocabulary} tokens and the model in {config.init_from} {loaded.vocab_size}: "
            "use the tokenizer it was trained with"
        )
    if config.max_length > loaded.max_length:
        raise ValueError(
            f"max_length is {config.max_length} and the model in {config.init_from} has {loaded.max_length} "
            "positions: lower max_length"
        )
    if config.next_sentence and not (loaded.add_pooler and (loaded.type_vocab_size or 0) > 1):
        raise ValueError(
            f"the model in {config.init_from} is a {loaded.model_type} without sentence types: use recipe roberta or "
            "modern, or next_sentence = false"
        )


def as_loaded(config: PretrainConfig, loaded: BertConfig) -> PretrainConfig:
    """The settings with the sizes and the form of the model in `init_from`, which stand in their place."""
    if config.init_from is None:
        return config
    return replace(
        config,
        layers=loaded.num_hidden_layers,
        hidden=loaded.hidden_size,
        heads=loaded.num_attention_heads,
        ffn=loaded.intermediate_size,
        max_position=loaded.max_length,
        positions=loaded.position_embedding_type,
        pre_norm=loaded.pre_norm,
        gated=loaded.gated,
        biases=loaded.biases,
        local_attention=loaded.local_attention,
        global_every=loaded.global_attn_every_n_layers,
        rope_theta=loaded.rope_theta,
        local_rope_theta=loaded.local_rope_theta,
    )
