"""From fairseq's RoBERTa checkpoints, such as those of `sapiens`, to Hugging Face directories.

A fairseq checkpoint is a pickle {"args": argparse.Namespace, "model": state dict, ...}. Its encoder is RoBERTa under
other names, without token types. The vocabulary is the file dict.txt beside it, with one `token count` per line. Its
tokens get the ids from 4 on; <s> <pad> </s> <unk> come before them and <mask> comes after them.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from fastbert.bert import BertConfig
from fastbert.data.tokenizer import save_tokenizer
from fastbert.files import listed, quoted, read_lines
from fastbert.models.checkpoint import State, fill, save, share_decoder
from fastbert.models.heads import BertForMaskedLM
from fastbert.models.names import Names, prefixed
from fastbert.models.weight_files import read_pickle

_ENCODER: Names = {
    "embeddings.word": "embed_tokens",
    "embeddings.position": "embed_positions",
    "embeddings.token_type": "embed_segments",
    "embeddings.norm": "emb_layer_norm",
    "layers.*.attention.qkv": tuple(f"layers.*.self_attn.{c}_proj" for c in "qkv"),
    "layers.*.attention.out": "layers.*.self_attn.out_proj",
    "layers.*.attention_norm": "layers.*.self_attn_layer_norm",
    "layers.*.feed_forward.up": "layers.*.fc1",
    "layers.*.feed_forward.down": "layers.*.fc2",
    "layers.*.output_norm": "layers.*.final_layer_norm",
}
_HEAD: Names = {
    "mlm_head": "decoder.lm_head",
    "mlm_head.dense": "decoder.lm_head.dense",
    "mlm_head.norm": "decoder.lm_head.layer_norm",
    "mlm_head.decoder": "decoder.lm_head",
}
_PREFIX = "decoder.sentence_encoder"
# our setting -> fairseq's argument
_SETTINGS = {
    "num_hidden_layers": "encoder_layers",
    "hidden_size": "encoder_embed_dim",
    "intermediate_size": "encoder_ffn_embed_dim",
    "num_attention_heads": "encoder_attention_heads",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_FIRST = ("<s>", "<pad>", "</s>", "<unk>")


def convert_fairseq_roberta(checkpoint_file: str | Path, out_dir: str | Path) -> None:
    """Write a Hugging Face RoBERTa directory with the masked-LM model of a fairseq checkpoint.

    A dict.txt beside the checkpoint becomes tokenizer.json, which splits text at spaces. No code in the checkpoint is
    executed. Raises FileNotFoundError if the file does not exist, ValueError if it is no fairseq RoBERTa.
    """
    file = Path(checkpoint_file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}: pass a fairseq .pt file")
    content = read_pickle(file, allowed=(Namespace,))
    state, arguments = _parts(content, file)
    names = {**prefixed(_ENCODER, _PREFIX), **_HEAD}
    word = state[f"{_PREFIX}.embed_tokens.weight"]
    # a RoBERTa in Hugging Face's format always has one token type
    state.setdefault(f"{_PREFIX}.embed_segments.weight", torch.zeros(1, word.shape[1]))
    tokenizer = _tokenizer(file.with_name("dict.txt"), word.shape[0])
    model = BertForMaskedLM(share_decoder(_config(state, arguments, file), state, names))
    unused = fill(model, state, names, str(file))
    if unused:
        raise ValueError(
            f"{file} has weights that a RoBERTa masked LM has not: {listed(unused)}: "
            "only plain RoBERTa models of fairseq are converted"
        )
    save(model, out_dir)
    if tokenizer is not None:
        save_tokenizer(tokenizer, out_dir)


def _parts(content: Any, file: Path) -> tuple[State, dict[str, Any]]:
    """The weights and the arguments of the training run."""
    state = content.get("model") if isinstance(content, dict) else None
    arguments = content.get("args") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(arguments, Namespace):
        raise ValueError(f"{file} is not a fairseq checkpoint: it needs `model` and `args`")
    if not isinstance(state.get(f"{_PREFIX}.embed_tokens.weight"), Tensor):
        raise ValueError(f"{file} holds no RoBERTa: it has no {_PREFIX}.embed_tokens.weight")
    return dict(state), vars(arguments)


def _config(state: State, arguments: dict[str, Any], file: Path) -> BertConfig:
    absent = [theirs for theirs in _SETTINGS.values() if theirs not in arguments]
    if absent:
        raise ValueError(f"{file} does not say its {', '.join(absent)} in `args`")
    activation = arguments.get("activation_fn", "gelu")
    if activation != "gelu":
        raise ValueError(
            f"{file} has activation_fn {quoted(activation)}: the head of a Hugging Face RoBERTa computes gelu only"
        )
    vocabulary, _ = state[f"{_PREFIX}.embed_tokens.weight"].shape
    return BertConfig(
        model_type="roberta",
        vocab_size=vocabulary,
        # as in Hugging Face, the first position is the padding id + 1
        max_position_embeddings=state[f"{_PREFIX}.embed_positions.weight"].shape[0],
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        extra={"bos_token_id": 0, "eos_token_id": 2},
        **{ours: arguments[theirs] for ours, theirs in _SETTINGS.items()},
    )


def _tokenizer(file: Path, vocabulary: int) -> Tokenizer | None:
    """The tokenizer of dict.txt, None without that file: it splits at spaces and adds <s> and </s>."""
    if not file.is_file():
        return None
    lines = read_lines(file)
    tokens = [*_FIRST, *(line.rsplit(" ", 1)[0] for line in lines), "<mask>"]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != vocabulary:
        raise ValueError(
            f"{file} gives {len(ids)} tokens with the special ones and the model has {vocabulary}: "
            "put the model's own dict.txt beside it"
        )
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.add_special_tokens([*_FIRST, "<mask>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer
