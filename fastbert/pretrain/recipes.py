"""The recipes of pretraining: what each one sets where nothing else is said."""

from __future__ import annotations

from typing import Any

# what a recipe sets where nothing else is said
BERT: dict[str, Any] = {
    "next_sentence": True,
    "mask_prob": 0.15,
    "tokenizer_kind": "wordpiece",
    "positions": "absolute",
    "pre_norm": False,
    "gated": False,
    "biases": True,
    "local_attention": 0,
    "dropout": 0.1,
    "lr": 1e-4,
}
RECIPES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": {**BERT, "next_sentence": False, "tokenizer_kind": "bpe"},
    # ModernBERT (Warner et al. 2024)
    "modern": {
        "next_sentence": False,
        "mask_prob": 0.3,
        # so that its losses compare with those of the other recipes
        "eval_mask_prob": 0.15,
        "tokenizer_kind": "bpe",
        "positions": "rotary",
        "pre_norm": True,
        "gated": True,
        "biases": False,
        "local_attention": 128,
        "dropout": 0.0,
        "lr": 1e-4,
    },
    # GPT-2 (Radford et al. 2019)
    "gpt": {
        **BERT,
        "next_sentence": False,
        "mask_prob": None,
        "tokenizer_kind": "bpe",
        "pre_norm": True,
    },
    # a bidirectional LSTM
    "lstm": {
        **BERT,
        "next_sentence": False,
        "tokenizer_kind": "bpe",
        "positions": "none",
        "lr": 1e-3,
    },
    # CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023)
    "two-towers": {
        **BERT,
        "next_sentence": False,
        "mask_prob": None,
        "pre_norm": True,
        "dropout": 0.0,
        "lr": 5e-4,
    },
    # ViLT (Kim et al. 2021)
    "single-stream": {**BERT, "next_sentence": False, "pre_norm": True, "lr": 5e-4},
}
POSITIONS = ("absolute", "sinusoidal", "rotary")
OF_IMAGES = ("two-towers", "single-stream")
# settings that the recipes of images do not read
TEXT_ALONE = (
    *("separator", "field", "short_seq_prob", "data_dir", "start", "init_from", "goal"),
    *("eval_tokens", "strategy"),
)
# settings that these recipes alone read, and those of them that two towers alone read
IMAGES_ALONE = (
    *("eval_images", "shift", "zoom", "turn", "tint"),
    *("drop_patches", "patch", "max_patches"),
)
TOWERS_ALONE = ("contrast", "chunk", "projection", "image_layers")
# the only values of settings of layers that an LSTM does not have; 12 heads are the default of all recipes
LSTM = {
    "heads": (1, 12),
    "ffn": (None, 1),
    "start": ("normal",),
    "positions": ("none",),
    "pre_norm": (False,),
    "gated": (False,),
    "biases": (True,),
    "local_attention": (0,),
    "attention_dropout": (None, 0.0),
}
