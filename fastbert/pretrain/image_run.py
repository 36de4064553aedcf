"""Pretraining on images beside text: the model of a recipe, its steps, and its run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.data import Batch, SpecialIds, vocabulary
from fastbert.models.images import with_patches
from fastbert.models.single_stream import BertForImageText
from fastbert.models.two_towers import ImageTextConfig, TwoTowers
from fastbert.pretrain.build import encoder_config
from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.image_feed import ImageFeed
from fastbert.pretrain.retrieval import evaluate_stream, evaluate_towers
from fastbert.train.loop import Run
from fastbert.train.session import Session, autocast
from fastbert.train.trainer import Stream, Trainer
from fastbert.train.world import World


def build_image_model(config: PretrainConfig, tokenizer: Any) -> TwoTowers | BertForImageText:
    """A fresh model of a recipe of images; raises ValueError where its sizes do not fit together."""
    pad = SpecialIds.of(tokenizer).pad
    patches = config.patch, config.max_patches
    text = encoder_config(config, len(vocabulary(tokenizer)), pad)
    if config.recipe == "single-stream":
        return BertForImageText(with_patches(text, *patches))
    image = encoder_config(config, 1, 0, image=True)
    towers = ImageTextConfig(
        text, with_patches(image, *patches), config.projection, config.contrast
    )
    model = TwoTowers(towers)
    model.chunk = config.chunk
    return model


class ImageTrainer(Trainer):
    """Steps on pairs; each loss is the sum over its terms / their number, over all batches and processes.

    Two towers compare the pairs of a batch with each other, and with those of no other batch or process.
    """

    config: PretrainConfig
    replayable = False

    def __init__(
        self, model: Any, data: Stream, config: PretrainConfig, world: World | None = None
    ) -> None:
        super().__init__(model, data, config, world)
        towers = config.recipe == "two-towers"
        self.losses = ("contrastive_loss",) if towers else ("mlm_loss", "matching_loss")

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """The number of pairs in the whole step; in a single stream of those that are asked, and of labelled tokens."""
        if self.config.recipe == "two-towers":
            pairs = self.world.total(sum(len(b["cu_seqlens"]) - 1 for b in batches))
            return {"num_pairs_in_batch": int(pairs)}
        asked = sum(int((b["matching_label"] != -100).sum()) for b in batches)
        labelled = sum(len(b["label_rows"]) for b in batches)
        pairs, words = (max(int(n), 1) for n in self.world.totals(asked, labelled))
        return {"num_pairs_in_batch": pairs, "num_items_in_batch": words}

    def backward(self, batch: Batch, counts: dict[str, int]) -> Tensor:
        """Add one batch's gradients; returns its losses, sums / the number of terms in the whole step."""
        call: Any = self.spread.call
        with autocast(self.device, self.config.precision):
            output = call(**batch, **counts)
        # gradients become means over the processes, and their sum is needed
        (output.loss * self.world.size).backward()
        return torch.stack([getattr(output, name) for name in self.losses]).detach().double()


class ImageRun(Run):
    """A run that is judged on held-out images with their captions."""

    command = "pretrain"
    goal: float | None = None

    def __init__(
        self, trainer: ImageTrainer, feed: ImageFeed, session: Session[PretrainConfig]
    ) -> None:
        super().__init__(trainer, session, feed.identity())
        self.feed = feed

    def evaluation(self) -> tuple[dict[str, float], str]:
        """Evaluate the model: the values to log, and a sentence with them. Every process does it by itself."""
        model: Any = self.trainer.model
        towers = self.feed.config.recipe == "two-towers"
        values = (evaluate_towers if towers else evaluate_stream)(model, self.feed)
        return values, f"held out at step {self.trainer.at.step}: {', '.join(shown(values))}"


def shown(values: dict[str, float]) -> list[str]:
    """The values of an evaluation for a person."""
    lines = []
    if "contrastive_loss" in values:
        lines.append(f"loss {values['contrastive_loss']:.4f}")
    else:
        lines.append(
            f"loss where [MASK] {values['mlm_loss_masked']:.4f}, pairs told apart "
            f"{values['matching_accuracy']:.1%}"
        )
    for way, name in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
        found = " ".join(f"R@{k} {values[f'{way}_r{k}']:.1%}" for k in (1, 5, 10))
        lines.append(f"{name} {found}")
    return lines
