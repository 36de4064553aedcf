"""The data of a run on images beside text: pairs in batches of packed tokens and patches, anew for every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbert.data import (
    Batch,
    Masker,
    load_tokenizer,
    rng,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from fastbert.data.images import U8, image_batch, moved, stretched, tinted
from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.feed import Interleaved
from fastbert.pretrain.pictures import Pictures, store_pictures
from fastbert.train.world import World

I64 = NDArray[np.int64]
# the draws of a pair in an epoch, by its key; those of masks have lower numbers
ASKED, OTHER, PARTNER, VARIED, DROPPED = ((1 << 20) + 16 * i for i in range(5))


class Pairs:
    """Batches of pairs: `batch(epoch, number)` depends on nothing but these, the settings and the part's number.

    In an epoch every image occurs once, with one of its captions, varied as the settings say. Images that do not
    fill a batch of every part are left out of the epoch.
    """

    def __init__(self, feed: ImageFeed, images: I64, part: int = 0, parts: int = 1) -> None:
        self.feed, self.images = feed, images
        self.part, self.parts = part, parts
        assert feed.config.batch_size is not None
        self.size = min(feed.config.batch_size, len(images) // parts)

    def num_batches(self, epoch: int = 0) -> int:
        """Batches of this part in an epoch."""
        return len(self.images) // (self.size * self.parts)

    def batch(self, epoch: int, number: int) -> Batch:
        """Batch `number` of `epoch`."""
        f, c = self.feed, self.feed.config
        order = rng.bits(rng.derive(c.seed, epoch, rng.Purpose.IMAGES), self.images).argsort()
        first = (number * self.parts + self.part) * self.size
        members = self.images[order[first : first + self.size]]

        counts = np.array([len(f.pictures.captions[i]) for i in members])
        key = rng.derive(c.seed, epoch, rng.Purpose.CAPTIONS)
        chosen = rng.integers(key, members, counts)
        texts = [f.tokens[i][k] for i, k in zip(members, chosen, strict=True)]
        keys = Masker.keys(c.seed, epoch, members)
        asked = rng.uniform(keys, np.array([ASKED])) < 0.5
        others = np.where(asked, f.partners(keys, self.images, members), members)
        shown = [
            self._varied(f.pictures.pixels(i), key) for i, key in zip(others, keys, strict=True)
        ]
        batch = f.paired(texts, shown, keys, asked, members == others, self._chosen(keys))
        batch.epoch, batch.number, batch.examples = epoch, number, tuple(members.tolist())
        return batch

    def _varied(self, pixels: U8, key: Any) -> U8:
        """An image of training, stretched, turned, moved and tinted at random by the settings."""
        config = self.feed.config
        draws = 2.0 * rng.uniform(key, np.arange(VARIED, VARIED + 8)) - 1.0
        if config.zoom or config.turn:
            down, across = (1.0 + config.zoom) ** draws[:2]
            pixels = stretched(pixels, down, across, config.turn * draws[2])
        if config.shift:
            pixels = moved(pixels, *(round(n) for n in (config.shift + 0.499) * draws[3:5]))
        if config.tint:
            pixels = tinted(pixels, (1.0 + config.tint) ** draws[5:])
        return pixels

    def _chosen(self, keys: rng.U64) -> Callable[[int, int], I64] | None:
        """The patches that are left of an image when a part of them is dropped, at least one."""
        config = self.feed.config
        part = config.drop_patches
        if not part:
            return None

        def choose(number: int, count: int) -> I64:
            order = rng.bits(keys[number], np.arange(DROPPED, DROPPED + count)).argsort()
            return np.sort(order[: max(round((1.0 - part) * count), 1)])

        return choose

    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches without end from number `start` of `epoch` on."""
        while True:
            yield from (self.batch(epoch, n) for n in range(start, self.num_batches(epoch)))
            epoch, start = epoch + 1, 0


class ImageFeed:
    """Pairs for training and for evaluation, their captions as tokens.

    In a single stream every second pair in training is asked whether it is one: half of these have another image, and
    no word is masked, since a mask would be an answer. In the others words are masked.
    """

    def __init__(
        self, config: PretrainConfig, tokenizer: Any, pictures: Pictures, world: World
    ) -> None:
        self.config, self.tokenizer, self.pictures = config, tokenizer, pictures
        self.masker = None
        if config.recipe == "single-stream":
            assert config.mask_prob is not None
            self.masker = Masker(tokenizer, config.mask_prob, config.whole_word)
        tokenizer.enable_truncation(config.max_length)
        # captions of all images in one call
        flat = tokenizer.encode_batch([c for captions in pictures.captions for c in captions])
        tokenizer.no_truncation()
        ids = iter([np.array(e.ids, np.int64) for e in flat])
        self.tokens = [[next(ids) for _ in captions] for captions in pictures.captions]
        train, self.held = self._split()
        least = 2 * world.shards
        if len(train) < least or len(self.held) < 2:
            raise ValueError(
                f"there are {len(train)} images to train on and {len(self.held)} held out: give at least {least} and 2"
            )
        self.train = Pairs(self, train, world.rank, world.shards)
        parts = [Pairs(self, train, part, world.shards) for part in world.parts]
        self.batches = Interleaved(parts) if len(parts) > 1 else self.train

    def _split(self) -> tuple[I64, I64]:
        """The numbers of the images for training and of those held out."""
        numbers, first = np.arange(len(self.pictures)), self.pictures.held_from
        if first is not None:
            return numbers[:first], numbers[first:]
        key = rng.derive(self.config.split_seed, rng.Purpose.HELD_OUT_IMAGES)
        order = rng.bits(key, numbers).argsort()
        count = max(math.ceil(self.config.heldout * len(numbers)), 2)
        return np.sort(order[count:]), np.sort(order[:count])

    def partners(self, keys: rng.U64, pool: I64, members: I64) -> I64:
        """The images beside the members' texts: their own, or in a single stream for every second one another."""
        if self.masker is None:
            return members
        drawn = pool[rng.integers(keys, np.array([PARTNER]), len(pool))]
        return np.where(rng.uniform(keys, np.array([OTHER])) < 0.5, drawn, members)

    def paired(
        self,
        texts: Sequence[I64],
        images: Sequence[U8],
        keys: rng.U64,
        asked: NDArray[np.bool_],
        own: NDArray[np.bool_],
        choose: Callable[[int, int], I64] | None = None,
    ) -> Batch:
        """The batch of texts beside images. In a single stream words are masked where it is not `asked` for a match."""
        batch = texts_of(texts)
        if self.masker is not None:
            ids, cu_seqlens = batch["input_ids"].numpy(), batch["cu_seqlens"].numpy()
            masked = self.masker(ids, cu_seqlens, keys)
            hidden = np.repeat(~asked, np.diff(cu_seqlens))
            batch["input_ids"] = torch.from_numpy(np.where(hidden, masked.input_ids, ids))
            batch["labels"] = torch.from_numpy(np.where(hidden, masked.labels, -100))
            batch["label_rows"] = torch.from_numpy(masked.label_rows[hidden[masked.label_rows]])
            batch["matching_label"] = torch.from_numpy(
                np.where(asked, (~own).astype(np.int64), -100)
            )
        batch.update(image_batch(images, self.config.patch, choose))
        return batch

    def identity(self) -> dict[str, str]:
        """Hashes of the tokenizer, and of images and captions."""
        return {
            "the tokenizer": tokenizer_hash(self.tokenizer),
            "the images and captions": self.pictures.digest,
        }

    def describe(self) -> str:
        """The sizes of the data in a few words."""
        captions = sum(map(len, self.pictures.captions))
        return (
            f"{len(self.pictures)} images with {captions} captions, {len(self.held)} images held out, "
            f"{self.train.num_batches()} batches an epoch"
        )

    def baselines(self) -> dict[str, float]:
        """What chance reaches in the evaluation."""
        return {f"chance R@{k}": min(k / len(self.held), 1.0) for k in (1, 5, 10)}


def texts_of(tokens: Sequence[I64]) -> Batch:
    """The batch of some texts' ids."""
    lengths = [len(ids) for ids in tokens]
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(tokens)),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        max_seqlen=max(lengths),
    )


def shared_image_feed(
    config: PretrainConfig, out: Path, world: World, *, resume: bool
) -> ImageFeed:
    """The data of a run; the main process decodes the images and trains the tokenizer, then the others read them."""
    path = out / "data" / "images"
    if world.main and not resume:
        assert config.images is not None
        sizes = config.patch, config.max_patches
        pictures = store_pictures(path, config.images, config.eval_images, *sizes)
        tokenizer = _tokenizer(config, pictures)
        feed = ImageFeed(config, tokenizer, pictures, world)
        save_tokenizer(tokenizer, out / "tokenizer")
    world.meet()
    if not world.main or resume:
        feed = ImageFeed(config, load_tokenizer(out / "tokenizer"), Pictures(path), world)
    return feed


def _tokenizer(config: PretrainConfig, pictures: Pictures) -> Any:
    if config.tokenizer is not None:
        try:
            return load_tokenizer(config.tokenizer)
        except ValueError as error:
            raise ValueError(
                f"the tokenizer in {config.tokenizer} can't be used: {error}"
            ) from error
    assert config.tokenizer_kind is not None
    # captions for evaluation are not read
    captions = [c for captions in pictures.captions[: pictures.held_from] for c in captions]
    return train_tokenizer(
        captions, config.tokenizer_kind, config.vocab_size, lowercase=config.lowercase
    )
