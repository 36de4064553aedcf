"""Int8 weights in the place of an encoder's floating-point ones, for good."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastbert.models.encoder import BertModel, Pretrained
from fastbert.nn.int8 import MATRICES, Int8Embedding, Int8Linear, replace_matrices
from fastbert.nn.int8_checks import why_not_exact, why_not_numbers
from fastbert.runners.frozen import PARTS


def is_replaced(model: nn.Module) -> bool:
    """Whether an encoder in the model has int8 weights."""
    return any(isinstance(m, Int8Linear) for m in model.modules())


def replace_weights(model: nn.Module, bits: int, embeddings: bool) -> None:
    """Hold the weights of the model's encoders as int8; one that does so already gets the `bits`.

    Raises TypeError for a model without an encoder of fastbert.bert, and ValueError, before anything is changed, for
    weights that can't be replaced.
    """
    encoders = [m for m in model.modules() if isinstance(m, BertModel)]
    if not encoders:
        raise TypeError(
            f"{type(model).__name__} has no encoder of fastbert.bert, whose weights replace=True replaces: save the "
            "model and load the folder with fastbert.bert"
        )
    _replace_all(model, encoders, bits, embeddings)


def set_bits(model: nn.Module, bits: int) -> None:
    """Set the activations' bits of every encoder that has int8 weights; floating-point encoders do not change."""
    encoders = [m for m in model.modules() if isinstance(m, BertModel) and is_replaced(m)]
    _replace_all(model, encoders, bits, False)


def _replace_all(
    model: nn.Module, encoders: Sequence[BertModel], bits: int, embeddings: bool
) -> None:
    for encoder in encoders:
        if reason := _why_not(encoder, bits, embeddings):
            raise ValueError(f"the weights can't be replaced by int8: {reason}")
    for encoder in encoders:
        _replace(encoder, bits, embeddings)
    for m in model.modules():
        if isinstance(m, Pretrained) and m.bert in encoders:
            rows = isinstance(m.bert.embeddings.word, Int8Embedding)
            # another model may have the same configuration
            m.config = dataclasses.replace(m.config, int8_bits=bits, int8_embeddings=rows)


def _why_not(encoder: BertModel, bits: int, embeddings: bool) -> str | None:
    if encoder.config.recurrent:
        return "its layers are LSTMs"
    word = encoder.embeddings.word
    wanted: dict[str, tuple[Any, tuple[type, ...]]] = {}
    for i, layer in enumerate(encoder.layers):
        parts = dict(layer.named_modules(remove_duplicate=False))
        wanted |= {f"{path} of layer {i}": (parts.get(path), PARTS[path]) for path in MATRICES}
    if embeddings:
        wanted["the word embedding"] = word, (nn.Embedding, Int8Embedding)
    for name, (m, kinds) in wanted.items():
        if type(m) not in kinds:
            return f"{name} is a {type(m).__name__}"
        if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m):
            return f"{name} has hooks or another forward"
        integers = isinstance(m, (Int8Linear, Int8Embedding))
        if reason := why_not_numbers(m.scale if integers else m.weight):
            return f"{name} {reason}"
        if reason := why_not_exact((m if integers else m.weight).shape[1], bits):
            return f"{name}: {reason}"
    return None


def _replace(encoder: BertModel, bits: int, embeddings: bool) -> None:
    for layer in encoder.layers:
        replace_matrices(layer, lambda m: Int8Linear.of(m, bits))
    word = encoder.embeddings.word
    if embeddings and not isinstance(word, Int8Embedding):
        encoder.embeddings.word = Int8Embedding.of(word, bits)
    for m in encoder.modules():
        if isinstance(m, (Int8Linear, Int8Embedding)):
            m.bits = bits
    encoder.for_inference(bits)
