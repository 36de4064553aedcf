"""PretrainConfig: every setting of `fastbert pretrain`, from a TOML or YAML file, from flags, or from Python."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastbert.files import IMAGES, SHARDS, TEXTS, TOKENIZER_FILES, existing, folder_or_new
from fastbert.pretrain.recipes import (
    BERT,
    IMAGES_ALONE,
    LSTM,
    OF_IMAGES,
    POSITIONS,
    RECIPES,
    TEXT_ALONE,
    TOWERS_ALONE,
)
from fastbert.train import settings
from fastbert.train.settings import (
    BATCH,
    DATA,
    LOSSES,
    MODEL,
    OPTIMISER,
    RUN,
    TOKENIZER,
    TrainingSettings,
    setting,
)


@dataclass
class PretrainConfig(TrainingSettings):
    """The settings of a pretraining run; None has the meaning that the comment gives.

    `recipe` gives the settings that are None and that RECIPES has, each of which can be set by itself. With the recipe
    modern the model is a ModernBERT, which transformers loads as long as these settings stay within its form; with gpt
    it is a GPT-2 and nothing is masked; with lstm it is a bidirectional LSTM, which fastbert alone loads.

    Raises TypeError or ValueError, naming the setting, for values that can't be.
    """

    sources: list[str] = setting(
        [],
        DATA,
        "text files, folders, .jsonl or .gz files, or - for standard input",
        path=True,
        check=partial(existing, remedy=TEXTS),
    )
    separator: str | None = setting(
        None,
        DATA,
        "line that ends a document in text files, '' for a blank one; default one per file",
    )
    field: str = setting("text", DATA, "field of a .jsonl line that holds its text")
    heldout: float = setting(0.05, DATA, "part of the documents that is kept for evaluation")
    recipe: str = setting(
        "bert",
        DATA,
        "bert: sentence pairs, MLM + NSP; roberta: full sentences, MLM only; modern: as ModernBERT, MLM only; gpt: the "
        "next word of blocks of max_length tokens; lstm: a bidirectional LSTM, MLM only; with images two-towers: CLIP "
        "or SigLIP; single-stream: as ViLT, MLM and matching",
    )
    images: str | None = setting(
        None,
        DATA,
        "folder of images with captions.tsv, .csv or .jsonl, instead of text",
        path=True,
        check=partial(existing, remedy=IMAGES),
    )
    eval_images: str | None = setting(
        None,
        DATA,
        "such a folder to judge the model on; default a part of the images",
        path=True,
        check=partial(existing, remedy=IMAGES),
    )
    shift: int = setting(
        0, DATA, "pixels by which images are moved at random in training, both ways"
    )
    zoom: float = setting(
        0.0,
        DATA,
        "part by which both sides of images are stretched or shrunk at random in training",
    )
    turn: float = setting(0.0, DATA, "degrees by which images are turned at random in training")
    tint: float = setting(
        0.0, DATA, "part by which each colour is made stronger or weaker at random in training"
    )
    drop_patches: float = setting(
        0.0, DATA, "part of an image's patches that training leaves out, others each time"
    )
    next_sentence: bool | None = setting(
        None, DATA, "sentence pairs and NSP; default in the recipe bert only"
    )
    max_length: int = setting(128, DATA, "tokens in the longest sequence, [CLS] and [SEP] included")
    short_seq_prob: float = setting(
        0.1, DATA, "part of the sequences that is cut to a random shorter length"
    )
    mask_prob: float | None = setting(
        None,
        DATA,
        "part of the tokens that is to be predicted; default .15, in the recipe modern .3",
    )
    eval_mask_prob: float | None = setting(
        None,
        DATA,
        "part of the held-out tokens that is to be predicted; default mask_prob, in the recipe modern .15",
    )
    whole_word: bool = setting(False, DATA, "mask whole words, not single pieces of them")
    data_dir: str | None = setting(
        None,
        DATA,
        "folder of the tokenised shards, to share between runs; default OUT/data",
        path=True,
        check=partial(folder_or_new, remedy=SHARDS),
    )

    tokenizer: str | None = setting(
        None,
        TOKENIZER,
        "folder or tokenizer.json to use; without it one is trained on the sources",
        check=partial(existing, remedy=TOKENIZER_FILES),
    )
    tokenizer_kind: str | None = setting(
        None, TOKENIZER, "wordpiece or bpe; default wordpiece in the recipe bert, bpe in the others"
    )
    vocab_size: int = setting(30522, TOKENIZER, "tokens of a tokenizer that is trained")
    lowercase: bool = setting(True, TOKENIZER, "a trained WordPiece tokenizer lowercases its text")

    layers: int = setting(12, MODEL, "encoder layers")
    hidden: int = setting(768, MODEL, "width of the encoder")
    heads: int = setting(12, MODEL, "attention heads")
    ffn: int | None = setting(
        None, MODEL, "width of the feed-forward block; default 4 x hidden, with a gate 8 / 3 of it"
    )
    max_position: int | None = setting(
        None,
        MODEL,
        "tokens in the longest sequence the model can ever see; default 512, in the recipe gpt max_length",
    )
    positions: str | None = setting(
        None,
        MODEL,
        "absolute (learned), sinusoidal or rotary positions; default absolute, in the recipe modern rotary",
    )
    pre_norm: bool | None = setting(
        None,
        MODEL,
        "LayerNorm before the blocks, not after them; default in the recipes modern and gpt only",
    )
    gated: bool | None = setting(
        None, MODEL, "a gated feed-forward, GEGLU; default in the recipe modern only"
    )
    biases: bool | None = setting(
        None, MODEL, "biases in linear layers and norms; default in all recipes but modern"
    )
    local_attention: int | None = setting(
        None,
        MODEL,
        "tokens that a token of a local layer sees, 0 for no local layers; default 0, in the recipe modern 128",
    )
    global_every: int = setting(
        3, MODEL, "of the layers, every so many from the first on sees all tokens"
    )
    rope_theta: float = setting(
        160000.0, MODEL, "base of the angles of rotary positions in layers that see all tokens"
    )
    local_rope_theta: float = setting(
        10000.0, MODEL, "base of the angles of rotary positions in local layers"
    )
    patch: int = setting(16, MODEL, "pixels in a side of a patch of an image")
    max_patches: int = setting(32, MODEL, "patches in the longest side of the largest image")
    image_layers: int | None = setting(
        None, MODEL, "two-towers: layers of the encoder of images; default layers"
    )
    projection: int = setting(256, MODEL, "two-towers: length of a vector")
    dropout: float | None = setting(
        None, MODEL, "dropout of hidden states; default .1, in the recipe modern 0"
    )
    attention_dropout: float | None = setting(
        None, MODEL, "dropout of attention weights; default as dropout"
    )
    initializer_range: float = setting(
        0.02, MODEL, "standard deviation of the normal distribution of fresh weights"
    )
    start: str = setting(
        "normal",
        MODEL,
        "normal, or neighbours: some heads start at the next tokens, for short trainings",
    )
    init_from: str | None = setting(
        None,
        MODEL,
        "model folder to start from; its sizes, its form and its tokenizer are used",
        path=True,
    )

    contrast: str = setting(
        "softmax", LOSSES, "two-towers: softmax (CLIP) or sigmoid (SigLIP) of a batch's pairs"
    )
    chunk: int = setting(
        0, BATCH, "two-towers: pairs encoded at once, with the gradients of the batch; 0 for all"
    )
    lr: float | None = setting(  # type: ignore[assignment]
        None, OPTIMISER, "peak learning rate; default 1e-4, lstm 1e-3, with images 5e-4"
    )
    minutes: float | None = setting(
        None, BATCH, "time for the steps; the first ones are timed and fix the number of steps"
    )
    goal: float | None = setting(
        None,
        BATCH,
        "end the run at the first evaluation whose loss at [MASK] is this many nats below the unigram entropy",
    )
    shards: int | None = setting(
        None, BATCH, "parts of a step's data that processes share; default their number"
    )
    max_tokens: int | None = setting(None, BATCH, "tokens in a batch; default 8192")
    batch_size: int | None = setting(None, BATCH, "sequences in a batch, instead of max_tokens")
    batch_ramp: float = setting(
        0.0,
        BATCH,
        "part of the steps over which the number of batches in a step grows from 1 to accumulate",
    )

    strategy: str = setting(
        "ddp", RUN, "between processes: ddp (whole weights on each) or fsdp (parts of them)"
    )
    eval_tokens: int = setting(65536, RUN, "held-out tokens that an evaluation reads, 0 for all")

    def __post_init__(self) -> None:
        # an unknown recipe is refused with the other settings
        known = RECIPES[self.recipe] if self.recipe in [*RECIPES] else BERT
        for name, value in known.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.eval_mask_prob is None:
            self.eval_mask_prob = self.mask_prob
        if self.max_position is None:
            # a GPT's blocks are all max_length tokens long: positions behind them would stay untrained
            self.max_position = self.max_length if self.recipe == "gpt" else 512
        super().__post_init__()
        if self.recipe in OF_IMAGES:
            self.batch_size = self.batch_size or 256
            if self.recipe == "two-towers":
                self.image_layers = self.image_layers or self.layers
        elif self.max_tokens is None and self.batch_size is None:
            self.max_tokens = 8192
        if self.attention_dropout is None:
            self.attention_dropout = 0.0 if self.recipe == "lstm" else self.dropout
        if self.ffn is None and self.recipe == "lstm":
            self.ffn = 1
        if self.ffn is None:
            # a gate has three matrices of this width, not two: the parameters stay about as many
            self.ffn = max(round(self.hidden / 6), 1) * 16 if self.gated else 4 * self.hidden

    def _check(self) -> None:
        super()._check()
        self._check_choices(
            {
                "recipe": tuple(RECIPES),
                "tokenizer_kind": ("wordpiece", "bpe", None),
                # an LSTM's other positions are refused below
                "positions": ("none", *POSITIONS) if self.recipe == "lstm" else POSITIONS,
                "start": ("normal", "neighbours"),
                "contrast": ("softmax", "sigmoid"),
                "strategy": ("ddp", "fsdp"),
            }
        )
        if self.max_tokens is not None and self.batch_size is not None:
            raise ValueError("max_tokens and batch_size are both set: a batch is measured by one")
        self._check_shares(
            *("heldout", "short_seq_prob", "mask_prob", "eval_mask_prob"),
            *("dropout", "attention_dropout"),
        )
        self._check_used_by_images()
        if self.recipe == "gpt":
            self._check_gpt()
        elif self.recipe in OF_IMAGES:
            self._check_images()
        elif not self.mask_prob or not self.eval_mask_prob or not self.heldout:
            raise ValueError(
                "mask_prob, eval_mask_prob and heldout must be above 0: there is nothing to learn or judge"
            )
        for name, values in LSTM.items() if self.recipe == "lstm" else ():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} is {getattr(self, name)} and recipe is lstm, whose layers have no such setting: leave it "
                    "out"
                )
        if not 0.0 <= self.batch_ramp <= 1.0:
            raise ValueError(f"batch_ramp is {self.batch_ramp}: it must be in [0, 1]")
        if self.batch_ramp and self.accumulate == 1:
            raise ValueError(
                "batch_ramp is set and accumulate is 1: raise accumulate, to which it leads"
            )
        self._check_least(0, "eval_tokens", "local_attention")
        sizes = ("max_length", "vocab_size", "layers", "hidden", "heads", "ffn", "max_position")
        self._check_least(
            1, *sizes, "minutes", "goal", "max_tokens", "batch_size", "initializer_range", "shards"
        )
        self._check_form()
        if self.goal is not None and not self.eval_every:
            raise ValueError(
                "goal is set and eval_every is 0: evaluations are what a goal is seen by"
            )
        assert self.max_position is not None
        if self.max_length > self.max_position:
            raise ValueError(
                f"max_length {self.max_length} is above max_position {self.max_position}: raise max_position"
            )
        if self.max_tokens is not None and self.max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens {self.max_tokens} is below max_length {self.max_length}: a batch holds whole sequences"
            )

    def _check_form(self) -> None:
        self._check_least(1, "global_every", "rope_theta", "local_rope_theta")
        angles = "rope_theta", "local_rope_theta"
        self._check_used(
            self.positions == "rotary", f"positions is {self.positions}, not rotary", *angles
        )
        local = "global_every", "local_rope_theta"
        self._check_used(bool(self.local_attention), "local_attention is 0", *local)

    def _check_used_by_images(self) -> None:
        own = self.recipe in OF_IMAGES
        if own != (self.images is not None):
            has = "images is set" if self.images else "images is not set"
            remedy = "name a folder of images" if own else f"choose {' or '.join(OF_IMAGES)}"
            raise ValueError(f"{has} and recipe is {self.recipe}: {remedy}")
        self._check_least(0, "shift", "chunk", "zoom", "turn", "tint")
        self._check_shares("drop_patches")
        self._check_least(1, "patch", "max_patches", "image_layers", "projection")
        reason = f"recipe is {self.recipe}"
        self._check_used(not own, f"{reason}, which reads images", *TEXT_ALONE)
        self._check_used(own, f"{reason}, which reads no images", *IMAGES_ALONE)
        towers = self.recipe == "two-towers"
        self._check_used(towers, f"{reason}, not two-towers", *TOWERS_ALONE)

    def _check_images(self) -> None:
        reason = f"recipe is {self.recipe}"
        for name in ("sources", "next_sentence", "local_attention", "max_tokens"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is set and {reason}, which has no use for it: leave it out"
                )
        masks = self.recipe == "single-stream"
        if bool(self.mask_prob) != masks or (self.whole_word and not masks):
            remedy = "set mask_prob above 0" if masks else "leave mask_prob and whole_word out"
            raise ValueError(f"{reason}, which masks {'words' if masks else 'no words'}: {remedy}")
        if self.positions == "rotary":
            raise ValueError(f"{reason} and positions is rotary: choose absolute or sinusoidal")
        if not self.heldout and self.eval_images is None:
            raise ValueError("heldout is 0: set it above 0, or name eval_images to judge on")

    def _check_gpt(self) -> None:
        for name in ("mask_prob", "eval_mask_prob", "whole_word", "next_sentence"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is set and recipe is gpt, which predicts every next word: leave it out"
                )
        if self.start != "normal":
            raise ValueError(
                f"start is {self.start} and recipe is gpt, whose tokens see none after them: use normal"
            )
        if not self.heldout:
            raise ValueError("heldout must be above 0: there is nothing to judge")

    def batches_of(self, step: int) -> int:
        """The number of batches that make optimiser step `step`: equal stairs up to `accumulate` over the ramp."""
        if not self.batch_ramp:
            return self.accumulate
        assert self.steps is not None
        return min(
            1 + int(self.accumulate * step / (self.batch_ramp * self.steps)), self.accumulate
        )

    @property
    def batches_a_step(self) -> float:
        """The mean number of batches of a step."""
        return self.accumulate - self.batch_ramp * (self.accumulate - 1) / 2


def load_settings(path: str | Path) -> dict[str, Any]:
    """Read the settings of a pretraining in a .toml, .yaml or .yml file, as `settings.load_settings` does."""
    return settings.load_settings(path, PretrainConfig)
