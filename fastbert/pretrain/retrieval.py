"""Retrieval between images and texts in both directions, and the evaluations of both recipes of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.data import Batch, Masker
from fastbert.data.images import image_batch
from fastbert.models.losses import contrastive_loss
from fastbert.models.single_stream import BertForImageText
from fastbert.models.two_towers import TwoTowers
from fastbert.nn.base import evaluating
from fastbert.pretrain.image_feed import ImageFeed, texts_of
from fastbert.train.session import autocast

RANKS = (1, 5, 10)
# held-out images and texts that a single stream ranks, each one beside each: as many sequences as its square
_RANKED = 40


def recalls(
    scores: Tensor,  # (queries, keys)
    wanted: Tensor,  # (queries,) int64
    owners: Tensor | None = None,  # (keys,) int64; None: the keys' numbers
    ranks: Sequence[int] = RANKS,
) -> dict[str, float]:
    """{"r1": ...}: the share of queries with a key of their own among the best 1, 5 and 10.

    A key belongs to the queries that want its owner. Wrong keys with the score of the best right one stand before it; a
    query without a key of its own, or with NaN among its scores, is not found.
    """
    keys = torch.arange(scores.shape[1], device=scores.device) if owners is None else owners
    right = wanted[:, None] == keys
    best = scores.masked_fill(~right, -torch.inf).amax(1)
    before = ((scores >= best[:, None]) & ~right).sum(1)
    found = right.any(1) & ~scores.isnan().any(1)
    return {f"r{k}": float((found & (before < k)).double().mean()) for k in ranks}


def both_ways(scores: Tensor, owners: Tensor) -> dict[str, float]:
    """recalls of scores (images, texts) from texts to images and back; `owners` (texts,) are the texts' images."""
    images = torch.arange(scores.shape[0], device=scores.device)
    found = {
        "text_to_image": recalls(scores.T, owners),
        "image_to_text": recalls(scores, images, owners),
    }
    return {f"{way}_{k}": value for way, values in found.items() for k, value in values.items()}


@torch.no_grad()
def evaluate_towers(model: TwoTowers, feed: ImageFeed) -> dict[str, float]:
    """The contrastive loss of held-out pairs in batches of training's size, and recalls of all captions and images."""
    size, held, device = feed.train.size, feed.held, model.device
    texts = [feed.tokens[i] for i in held]
    owners = torch.tensor([n for n, some in enumerate(texts) for _ in some], device=device)
    flat = [ids for some in texts for ids in some]
    with evaluating(model), autocast(device, feed.config.precision):
        shown = [
            model.embed_images(**images_of(feed, held[i : i + size]).to(device))
            for i in range(0, len(held), size)
        ]
        said = [
            model.embed_texts(**texts_of(flat[i : i + size]).to(device))
            for i in range(0, len(flat), size)
        ]
    images, words = torch.cat(shown), torch.cat(said)
    # the first caption of every image
    firsts = words[torch.tensor(np.cumsum([0] + [len(some) for some in texts[:-1]]), device=device)]
    total = 0.0
    for a, b in zip(images.split(size), firsts.split(size), strict=True):
        total += float(contrastive_loss(model.similarity(a, b), model.config.loss)) * len(a)
    return {"contrastive_loss": total / len(images), **both_ways(images @ words.T, owners)}


@torch.no_grad()
def evaluate_stream(model: BertForImageText, feed: ImageFeed) -> dict[str, float]:
    """Words of held-out pairs under one fixed mask, and matching of the pairs without it, half with another image.

    Recalls rank the first images and their first captions by the odds that they match.
    """
    assert feed.masker is not None
    c, held, size = feed.config, feed.held, feed.train.size
    # as in PretrainingData, no usual training seed repeats these draws
    keys = Masker.keys(c.split_seed + (1 << 32), 0, held)
    others = feed.partners(keys, held, held)
    # loss, right and number of masked words; right pairs
    sums = np.zeros(4)
    with evaluating(model), autocast(model.device, c.precision):
        for i in range(0, len(held), size):
            part = slice(i, i + size)
            texts = [feed.tokens[j][0] for j in held[part]]
            for asked, beside in ((False, held[part]), (True, others[part])):
                batch = feed.paired(
                    texts,
                    [feed.pictures.pixels(j) for j in beside],
                    keys[part],
                    np.full(len(texts), asked),
                    held[part] == beside,
                )
                sums += _judged(model, batch, feed.masker.special.mask)
        some = held[:_RANKED]
        scores = torch.stack([_match(model, feed, image, some) for image in some])
    loss, right, masked, pairs = sums.tolist()
    found = both_ways(scores, torch.arange(len(some), device=scores.device))
    return {
        "mlm_loss_masked": loss / max(masked, 1.0),
        "accuracy_masked": right / max(masked, 1.0),
        "matching_accuracy": pairs / len(held),
        "masked": masked,
        **found,
    }


def _judged(model: BertForImageText, batch: Batch, mask: int) -> Any:
    there = batch.to(model.device)
    output = model(**there, return_logits=True)
    assert output.logits is not None
    rows = there["label_rows"]
    hidden = there["input_ids"][rows] == mask
    labels, logits = there["labels"][rows][hidden], output.logits.float()[hidden]
    loss = tnf.cross_entropy(logits, labels, reduction="sum")
    right = (logits.argmax(1) == labels).sum()
    pairs = (output.matching_logits.argmax(1) == there["matching_label"]).sum()
    return np.array([float(loss), float(right), len(labels), float(pairs)])


def _match(model: BertForImageText, feed: ImageFeed, image: int, others: Any) -> Tensor:
    """(others,): the log odds that an image and the first caption of each of the others are a pair."""
    batch = texts_of([feed.tokens[j][0] for j in others])
    batch.update(image_batch([feed.pictures.pixels(image)] * len(others), feed.config.patch))
    logits = model(**batch.to(model.device)).matching_logits.float()
    return logits[:, 0] - logits[:, 1]


def images_of(feed: ImageFeed, numbers: Any) -> Batch:
    """The batch of some images."""
    return Batch(image_batch([feed.pictures.pixels(i) for i in numbers], feed.config.patch))
