"""Batches of pretraining examples: a pure function of the settings, the epoch, the batch's number and the rank."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastbert.data import rng
from fastbert.data.collate import Batch, packed_batch
from fastbert.data.masking import Masked, Masker
from fastbert.data.pairs import Examples, blocks, full_sentences, ranges, sentence_pairs, walk
from fastbert.data.settings import DataSettings
from fastbert.data.shards import Shards, ShardsError
from fastbert.data.tokenizer import SpecialIds, tokenizer_hash
from fastbert.files import quoted

I64 = NDArray[np.int64]

# examples are sorted by length within this many steps, so that order stays random beyond them
_WINDOW = 64


@dataclass(frozen=True)
class Plan:
    """An epoch of one rank: batch n holds the examples members[bounds[n]:bounds[n + 1]]."""

    examples: Examples
    members: I64  # example numbers, batch by batch
    bounds: I64  # (batches + 1,)

    def __len__(self) -> int:
        return len(self.bounds) - 1


def bucketed(
    lengths: I64, batch_size: int, key: rng.U64, rank: int = 0, world_size: int = 1
) -> tuple[I64, I64]:
    """Members and bounds of batches of `batch_size` examples of like lengths, in random order.

    One step of all ranks is cut from neighbours in length, so no rank waits for another. With several ranks the
    examples that don't fill a step are left out.
    """
    step = batch_size * world_size
    order = np.argsort(rng.bits(key, np.arange(len(lengths))), kind="stable")
    if world_size > 1:
        order = order[: len(order) - len(order) % step]
    window = np.arange(len(order)) // (step * _WINDOW)
    order = order[np.lexsort((lengths[order], window))]
    steps = np.arange(len(order)) // step
    count = -(-len(order) // step)
    ranked = np.argsort(np.argsort(rng.bits(key, np.arange(count) + (1 << 62)), kind="stable"))
    order = order[np.argsort(ranked[steps], kind="stable")]
    sizes = np.bincount(ranked[steps], minlength=count)
    if world_size > 1:
        order, sizes = order.reshape(-1, step)[:, rank::world_size].ravel(), sizes // world_size
    return order, np.concatenate([[0], np.cumsum(sizes)])


def packed(
    lengths: I64, max_tokens: int, key: rng.U64, rank: int = 0, world_size: int = 1
) -> tuple[I64, I64]:
    """Members and bounds of batches that take examples in random order up to `max_tokens` tokens.

    With several ranks the batches that don't fill a step of all ranks are left out.
    """
    order = np.argsort(rng.bits(key, np.arange(len(lengths))), kind="stable")
    total = np.concatenate([[0], np.cumsum(lengths[order])])
    starts = walk(np.searchsorted(total[1:], total[:-1] + max_tokens, side="right"))
    ends = np.append(starts[1:], len(order))
    mine = np.arange(rank, len(starts) - len(starts) % world_size, world_size)
    starts, ends = starts[mine], ends[mine]
    return order[ranges(starts, ends)], np.concatenate([[0], np.cumsum(ends - starts)])


class PretrainingData:
    """Batches of a shard folder's documents, those of the training or of the held-out part; masked but in recipe gpt.

    batch(epoch, number) depends on nothing but these arguments: any position can be resumed at once. Ranks get disjoint
    examples and the same number of batches. The held-out part has the same pairs and masks in every epoch, whatever the
    seed. Raises ShardsError for shards of another tokenizer and ValueError for settings that the text can't fulfil.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        settings: DataSettings,
        *,
        part: str = "train",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if part not in ("train", "heldout"):
            raise ValueError(f"part is {quoted(part)}: choose train or heldout")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}: it must be within [0, world_size)")
        if shards.manifest["tokenizer"] != tokenizer_hash(tokenizer):
            raise ShardsError(
                f"{shards.folder} was made with another tokenizer: load that one or rebuild it"
            )
        self.shards, self.settings, self.part = shards, settings, part
        self.rank, self.world_size = rank, world_size
        least = 2 if settings.recipe == "bert" else 1
        both = shards.split(settings.heldout, settings.split_seed, least)
        self.documents = both[part == "heldout"]
        if len(self.documents) == 0:
            raise ValueError("no document is held out: set heldout above 0")
        self.special = SpecialIds.of(tokenizer)
        self._masker = Masker(tokenizer, settings.mask_prob, settings.whole_word)
        self._plans: dict[int, Plan] = {}
        self._lock = threading.Lock()

    def num_batches(self, epoch: int = 0) -> int:
        """Batches of this rank in an epoch; epochs differ a little."""
        return len(self.plan(epoch))

    def num_tokens(self, epoch: int = 0) -> int:
        """Tokens of this rank in an epoch."""
        plan = self.plan(epoch)
        return int(plan.examples.lengths()[plan.members].sum())

    def plan(self, epoch: int) -> Plan:
        """The epoch's examples and batches; the last two epochs are kept."""
        seed, epoch = self._source(epoch)
        with self._lock:
            if epoch not in self._plans:
                plan = self._plan(seed, epoch)
                kept = list(self._plans.items())[-1:]
                self._plans = dict([*kept, (epoch, plan)])
            return self._plans[epoch]

    def batch(self, epoch: int, number: int) -> Batch:
        """Batch `number` of `epoch`, packed; raises IndexError past the epoch's end."""
        plan = self.plan(epoch)
        if not 0 <= number < len(plan):
            raise IndexError(
                f"batch {number} is outside epoch {epoch}, which has {len(plan)} batches"
            )
        members = plan.members[plan.bounds[number] : plan.bounds[number + 1]]
        ids, types, cu_seqlens = self._assemble(plan.examples, members)
        if self.settings.recipe == "gpt":
            # every token but the last of a block predicts the next one, whose label the model reads itself
            rows = np.delete(np.arange(len(ids)), cu_seqlens[1:] - 1)
            batch = packed_batch(Masked(ids, ids, rows), None, cu_seqlens, None)
        else:
            masked = self._masker(ids, cu_seqlens, self._masker.keys(*self._source(epoch), members))
            labels = plan.examples.labels
            given = None if labels is None else labels[members]
            batch = packed_batch(masked, types, cu_seqlens, given)
        batch.epoch, batch.number, batch.examples = epoch, number, tuple(members.tolist())
        return batch

    def batches(self, epoch: int = 0, start: int = 0, prefetch: int = 2) -> Iterator[Batch]:
        """The batches of one epoch from number `start`; `prefetch` of them are made ahead in a thread (0: none)."""
        count = self.num_batches(epoch)
        if not 0 <= start <= count:
            raise IndexError(f"batch {start} is outside epoch {epoch}, which has {count} batches")
        return _ahead((self.batch(epoch, number) for number in range(start, count)), prefetch)

    def stream(self, epoch: int = 0, start: int = 0, prefetch: int = 2) -> Iterator[Batch]:
        """Batches without end from (epoch, start) on, through this epoch and the following ones."""
        first = self.batches(epoch, start, prefetch=0)

        def endless() -> Iterator[Batch]:
            yield from first
            later = epoch
            while True:
                later += 1
                yield from self.batches(later, prefetch=0)

        return _ahead(endless(), prefetch)

    def _source(self, epoch: int) -> tuple[int, int]:
        """The seed and the epoch that examples and masks are drawn for."""
        if epoch < 0:
            raise IndexError(f"epoch is {epoch}: it must not be negative")
        # 2**32 is added, so that the held-out part repeats the draws of no usual training seed
        return (
            (self.settings.split_seed + (1 << 32), 0)
            if self.part == "heldout"
            else (self.settings.seed, epoch)
        )

    def _plan(self, seed: int, epoch: int) -> Plan:
        settings = self.settings
        common: dict[str, Any] = {"max_length": settings.max_length, "seed": seed, "epoch": epoch}
        if settings.recipe == "bert":
            short = settings.short_seq_prob
            examples = sentence_pairs(self.shards, self.documents, short_seq_prob=short, **common)
        else:
            make = blocks if settings.recipe == "gpt" else full_sentences
            examples = make(self.shards, self.documents, **common)
        lengths, key = examples.lengths(), rng.derive(seed, epoch, rng.Purpose.BATCHES)
        if settings.max_tokens is None:
            members, bounds = bucketed(
                lengths, settings.batch_size, key, self.rank, self.world_size
            )
        else:
            members, bounds = packed(lengths, settings.max_tokens, key, self.rank, self.world_size)
        if len(bounds) < 2:
            raise ValueError(
                f"{len(examples)} examples don't fill one batch on each of {self.world_size} ranks: add text or "
                "make the batches smaller"
            )
        return Plan(examples, members, bounds)

    def _assemble(self, examples: Examples, members: I64) -> tuple[I64, I64, I64]:
        """Tokens and types (T,) and cu_seqlens (B + 1,): [CLS] unless pieces say, then every piece and its [SEP]."""
        counts = examples.offsets[members + 1] - examples.offsets[members]  # (B,) pieces
        piece = ranges(examples.offsets[members], examples.offsets[members + 1])  # (P,)
        starts, ends = examples.starts[piece], examples.ends[piece]
        sizes = examples.sizes(piece)  # (P,) with the [SEP]
        owner = np.repeat(np.arange(len(members)), counts)  # (P,)
        lead = int(examples.closed is None)
        place = np.cumsum(sizes) - sizes + lead * (owner + 1)  # (P,) row of a piece's first token
        cu_seqlens = np.zeros(len(members) + 1, np.int64)
        cu_seqlens[1:] = np.cumsum(np.bincount(owner, sizes, len(members)).astype(np.int64) + lead)
        ids = np.full(cu_seqlens[-1], self.special.sep, np.int64)
        if lead:
            ids[cu_seqlens[:-1]] = self.special.cls
        ids[ranges(place, place + ends - starts)] = self.shards.tokens[ranges(starts, ends)]
        types = np.zeros_like(ids)
        if examples.labels is not None:
            types[ranges(place[1::2], place[1::2] + sizes[1::2])] = 1
        return ids, types, cu_seqlens


_END = object()


def _ahead(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """The same batches in the same order, up to `depth` of them made ahead in a thread."""
    if depth <= 0:
        return batches
    return _consume(batches, depth)


def _consume(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(_END)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="fastbert-data", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        # also when the consumer stops early: the thread ends before the iterator is gone
        stop.set()
        thread.join()
