"""Tokenised examples, and packed batches of them as a pure function of the seed, the epoch and the batch's number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbert.data import Batch, rng

I64 = NDArray[np.int64]


@dataclass
class Features:
    """Sequences of tokens; a long example may have several.

    `targets` are what the model's forward takes, each with an array per sequence: of one value, or of one a token.
    `places` are the task's: they lead from tokens back to words or characters of the example.
    """

    ids: list[I64] = field(default_factory=list)  # (S_i,) each
    types: list[I64] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # example of each sequence
    targets: dict[str, list[I64]] = field(default_factory=dict)
    places: list[I64] = field(default_factory=list)
    # examples that did not fit and were cut
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def add(
        self, ids: Sequence[int], types: Sequence[int], owner: int, **targets: Sequence[int]
    ) -> None:
        """Append a sequence."""
        self.ids.append(np.asarray(ids, np.int64))
        self.types.append(np.asarray(types, np.int64))
        self.owners.append(owner)
        for name, values in targets.items():
            self.targets.setdefault(name, []).append(np.asarray(values, np.int64))

    def check_tokens(self, known: int) -> None:
        """Raise ValueError for a token that a model of so many tokens lacks."""
        largest = max((int(ids.max()) for ids in self.ids if len(ids)), default=0)
        if largest >= known:
            raise ValueError(
                f"the text has token {largest} of the tokenizer and the model has {known} tokens, from 0 on: copy the "
                "tokenizer that it was trained with"
            )

    def batch(self, members: Sequence[int]) -> Batch:
        """These sequences, packed."""
        lengths = [len(self.ids[i]) for i in members]
        batch = Batch(
            input_ids=_joined(self.ids, members),
            token_type_ids=_joined(self.types, members),
            cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
            max_seqlen=max(lengths),
        )
        for name, values in self.targets.items():
            batch[name] = _joined(values, members)
        batch.examples = tuple(members)
        return batch

    def batches(self, size: int) -> Iterator[Batch]:
        """All sequences in their order."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))


def _joined(values: Sequence[I64], members: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([values[i] for i in members]))


def items(batch: Batch) -> int:
    """The number of terms in the mean that is the batch's loss."""
    if "labels" in batch:
        return int((batch["labels"] != -100).sum())
    return len(batch["start_positions"])


class Shuffled:
    """Training batches of `size` sequences in an order of its own for every epoch; the last one may be smaller."""

    def __init__(self, features: Features, size: int, seed: int) -> None:
        self.features, self.size, self.seed = features, size, seed

    def __len__(self) -> int:
        return -(-len(self.features) // self.size)

    def batch(self, epoch: int, number: int) -> Batch:
        """Batch `number` of `epoch`; it depends on nothing else."""
        return self._batch(self._order(epoch), epoch, number)

    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches without end from number `start` of `epoch` on."""
        while True:
            order = self._order(epoch)
            yield from (self._batch(order, epoch, n) for n in range(start, len(self)))
            epoch, start = epoch + 1, 0

    def _order(self, epoch: int) -> I64:
        key = rng.derive(self.seed, epoch, rng.Purpose.EXAMPLES)
        return np.argsort(rng.bits(key, np.arange(len(self.features))), kind="stable")

    def _batch(self, order: I64, epoch: int, number: int) -> Batch:
        members = order[number * self.size : (number + 1) * self.size].tolist()
        batch = self.features.batch(members)
        batch.epoch, batch.number = epoch, number
        return batch


def split(groups: Sequence[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the examples kept and held out: whole groups, `share` of them, but at least one on each side.

    Examples of one text are a group. Raises ValueError where there is a single one.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        times = f", {len(groups)} times" if len(groups) > 1 else ""
        raise ValueError(
            f"the training data has one text only{times}, and none can be held out: pass validation, or more texts"
        )
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    key = rng.derive(seed, rng.Purpose.EXAMPLES)
    order = np.argsort(rng.bits(key, np.arange(len(names))), kind="stable")
    out = {names[i] for i in order[:count]}
    kept = [i for i, name in enumerate(groups) if name not in out]
    held = [i for i, name in enumerate(groups) if name in out]
    return kept, held
