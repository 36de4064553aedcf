"""The data of a run: its tokenizer, its shards, training batches, and held-out batches, under one fixed mask."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.data import (
    Batch,
    DataSettings,
    Documents,
    PretrainingData,
    Shards,
    ShardsError,
    build_shards,
    load_tokenizer,
    read_documents,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    vocabulary,
)
from fastbert.pretrain.baselines import IGNORED, mask_baselines
from fastbert.pretrain.config import PretrainConfig
from fastbert.train.trainer import Stream
from fastbert.train.world import World

# counting more of a large corpus than this does not make the baselines better
_COUNTED_TOKENS = 20_000_000


class Interleaved:
    """The batches of several parts of the data in turn: those of number 0, those of number 1, and so on."""

    def __init__(self, parts: Sequence[Stream]) -> None:
        self.parts = parts

    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches without end from number `start` of `epoch` on; all parts have as many in an epoch."""
        for batches in zip(*(part.stream(epoch, start) for part in self.parts), strict=True):
            yield from batches


class Feed:
    """Training and held-out batches of some shards; `eval_batches` of the held-out ones are read."""

    def __init__(
        self, config: PretrainConfig, tokenizer: Any, shards: Shards, world: World
    ) -> None:
        self.causal = config.recipe == "gpt"
        # nothing is masked for a GPT: the shares are not read
        share, judged_share = config.mask_prob or 0.15, config.eval_mask_prob or 0.15
        recipe = "bert" if config.next_sentence else "roberta"
        settings = DataSettings(
            recipe="gpt" if self.causal else recipe,
            max_length=config.max_length,
            short_seq_prob=config.short_seq_prob,
            mask_prob=share,
            whole_word=config.whole_word,
            batch_size=config.batch_size or 1,
            max_tokens=config.max_tokens,
            heldout=config.heldout,
            seed=config.seed,
            split_seed=config.split_seed,
        )
        self.tokenizer = tokenizer
        self.shards = shards
        self.train = PretrainingData(
            shards, tokenizer, settings, rank=world.rank, world_size=world.shards
        )
        others = [
            PretrainingData(shards, tokenizer, settings, rank=part, world_size=world.shards)
            for part in world.parts[1:]
        ]
        self.batches = Interleaved([self.train, *others]) if others else self.train
        judged = replace(settings, mask_prob=judged_share)
        self.heldout = PretrainingData(shards, tokenizer, judged, part="heldout")
        self.mask_id = self.heldout.special.mask
        self.eval_batches = _first_batches(self.heldout, config.eval_tokens)
        self._baselines: dict[str, float] | None = None

    def held_out(self) -> Iterator[Batch]:
        """The held-out batches that are read, always the same."""
        return (self.heldout.batch(0, number) for number in range(self.eval_batches))

    def identity(self) -> dict[str, str]:
        """Hashes of the tokenizer and of the text: a run is resumed with the same ones only."""
        files = json.dumps(self.shards.manifest["files"], sort_keys=True)
        return {
            "the tokenizer": tokenizer_hash(self.tokenizer),
            "the tokenised text": hashlib.sha256(files.encode()).hexdigest(),
        }

    def describe(self) -> str:
        """The sizes of the data in a few words."""
        m = self.shards.manifest
        return (
            f"{m['tokens'] / 1e6:.2f} M tokens in {m['documents']} documents, {len(self.heldout.documents)} of them "
            f"held out, {self.train.num_batches(0)} batches an epoch"
        )

    def baselines(self) -> dict[str, float]:
        """What counting predicts where the held-out input is [MASK], or of next words, in nats; counted once."""
        if self._baselines is None:
            self._baselines = self._counted()
        return self._baselines

    def _counted(self) -> dict[str, float]:
        ids: list[NDArray[np.int64]] = []
        labels: list[NDArray[np.int64]] = []
        special = set(self.heldout.special.all)
        stream = self._stream()
        for batch in self.held_out():
            bounds = batch["cu_seqlens"].numpy()[1:-1]
            if self.causal:
                rows, tokens = batch["label_rows"].numpy(), batch["input_ids"].numpy()
                hidden, none = np.full_like(rows, self.mask_id), np.full_like(rows, IGNORED)
                # a next word as one that is hidden, as all behind it are
                ids.append(np.stack([tokens[rows], hidden, hidden], 1).ravel())
                labels.append(np.stack([none, tokens[rows + 1], none], 1).ravel())
            else:
                ids += np.split(batch["input_ids"].numpy(), bounds)
                labels += np.split(batch["labels"].numpy(), bounds)
        if self.causal:
            # the end of a document is predicted too
            special -= {self.heldout.special.sep}
            stream = np.where(stream < 0, self.heldout.special.sep, stream)
        size = len(vocabulary(self.tokenizer))
        found = mask_baselines(stream, ids, labels, self.mask_id, size, sorted(special))
        name = "left bigrams" if self.causal else "left and right bigrams"
        return {"unigram entropy": found.unigram, name: found.bigram}

    def _stream(self) -> NDArray[np.int64]:
        """(T,) the training documents in the text's order, -1 between them."""
        parts: list[NDArray[np.int64]] = []
        count = 0
        first = self.shards.sentences[
            self.shards.documents
        ]  # (documents + 1,) token each one starts at
        for number in self.train.documents:
            ids = self.shards.tokens[first[number] : first[number + 1]].astype(np.int64)
            parts += [ids, np.array([-1])]
            count += len(ids)
            if count > _COUNTED_TOKENS:
                break
        return np.concatenate(parts)


def _first_batches(data: PretrainingData, tokens: int) -> int:
    """The number of batches, from the first on, that hold `tokens` tokens; all of them for 0."""
    plan = data.plan(0)
    ends = np.cumsum(plan.examples.lengths()[plan.members])[plan.bounds[1:] - 1]
    return min(int(np.searchsorted(ends, tokens)) + 1, len(plan)) if tokens else len(plan)


def shared_feed(
    config: PretrainConfig,
    out: Path,
    world: World,
    *,
    resume: bool,
    rebuild: bool = False,
    quiet: bool = False,
) -> Feed:
    """The data of a run. The main process makes what is missing; then the others open it."""
    if not world.main:
        world.meet()
        return reopen_feed(config, out, world)
    if resume:
        feed = reopen_feed(config, out, world, rebuild)
    else:
        feed = prepare_feed(config, out, world, quiet, rebuild)
    world.meet()
    return feed


def prepare_feed(
    config: PretrainConfig, out: Path, world: World, quiet: bool = False, rebuild: bool = False
) -> Feed:
    """Train or load the tokenizer, tokenise the sources or open shards that fit; writes OUT/tokenizer and shards."""
    # progress bars are for terminals only
    quiet = quiet or not sys.stderr.isatty()
    documents = _documents(config)
    tokenizer = _tokenizer(config, documents, quiet)
    folder = _folder(config, out)
    try:
        shards = build_shards(documents, tokenizer, folder, rebuild=rebuild, progress=not quiet)
    except ShardsError:
        # OUT holds no run yet: its shards are left from an attempt that never started training
        if config.data_dir is not None:
            raise
        shards = build_shards(documents, tokenizer, folder, rebuild=True, progress=not quiet)
    feed = Feed(config, tokenizer, shards, world)
    save_tokenizer(tokenizer, out / "tokenizer")
    return feed


def reopen_feed(config: PretrainConfig, out: Path, world: World, rebuild: bool = False) -> Feed:
    """The data of the run in `out`, tokenised again with `rebuild`.

    Raises ShardsError, naming what differs, when the sources have changed or the shards are damaged.
    """
    tokenizer = load_tokenizer(out / "tokenizer")
    if rebuild:
        # another text is refused later: the checkpoint has the shards' checksums
        build_shards(_documents(config), tokenizer, _folder(config, out), rebuild=True)
    shards = Shards.open(_folder(config, out))
    if "-" not in config.sources:
        shards.check(_documents(config), tokenizer)
    return Feed(config, tokenizer, shards, world)


def _documents(config: PretrainConfig) -> Documents:
    return read_documents(config.sources, separator=config.separator, field=config.field)


def _folder(config: PretrainConfig, out: Path) -> Path:
    return out / "data" if config.data_dir is None else Path(config.data_dir)


def _tokenizer(config: PretrainConfig, documents: Documents, quiet: bool) -> Any:
    path = config.tokenizer or config.init_from
    if path is not None:
        try:
            return load_tokenizer(path)
        except ValueError as error:
            raise ValueError(f"the tokenizer in {path} can't be used: {error}") from error
    assert config.tokenizer_kind is not None
    return train_tokenizer(
        documents,
        config.tokenizer_kind,
        config.vocab_size,
        lowercase=config.lowercase,
        progress=not quiet,
    )
