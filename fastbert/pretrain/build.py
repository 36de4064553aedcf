"""The model that follows from a run's settings and its tokenizer."""

from __future__ import annotations

from typing import Any

from fastbert.data import SpecialIds, vocabulary
from fastbert.models.heads import BertForMaskedLM, BertForPreTraining
from fastbert.pretrain.config import PretrainConfig, check_loaded, model_config
from fastbert.pretrain.initial import start_with_neighbours


def build_model(config: PretrainConfig, tokenizer: Any) -> BertForPreTraining | BertForMaskedLM:
    """A fresh model, or the one in `init_from`. Raises ValueError when tokenizer, sizes and recipe do not fit."""
    kind = BertForPreTraining if config.recipe == "bert" else BertForMaskedLM
    if config.init_from is None:
        pad = SpecialIds.of(tokenizer).pad
        model = kind(model_config(config, len(vocabulary(tokenizer)), pad))
        if config.start == "neighbours":
            start_with_neighbours(model.bert)
        return model
    model = kind.from_pretrained(
        config.init_from,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
    )
    check_loaded(model.config, config, len(vocabulary(tokenizer)))
    return model
