"""Which tokens make an example: BERT's sentence pairs, RoBERTa's full sentences, GPT's blocks; anew for every epoch.

An example is a few ranges ("pieces") of the flat token array, [CLS] piece [SEP] or [CLS] piece [SEP] piece [SEP] ...,
or a block piece [SEP] piece ... with [SEP] at ends of documents; no token is copied until its batch is made. What
happens at a sentence is a function of (seed, epoch, sentence number), so it is computed for all sentences at once, and
a short walk then visits those at which an example begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.data import rng
from fastbert.data.shards import Shards

I64 = NDArray[np.int64]

# documents are handled in blocks of about this many sentences, which bounds the memory
_BLOCK = 1 << 20
# independent draws at one sentence
_SHORT, _LENGTH, _SPLIT, _DOCUMENT, _START, _FRONT_A, _FRONT_B, _DRAWS = range(8)


@dataclass(frozen=True)
class Examples:
    """Examples as token ranges: example e has the pieces offsets[e] to offsets[e + 1]."""

    starts: I64  # (P,) first token of a piece
    ends: I64  # (P,) one past its last
    offsets: I64  # (E + 1,)
    labels: I64 | None  # (E,) 0 = B follows A, 1 = B is from another document; None without NSP
    # (P,) whether a [SEP] follows a piece, and no [CLS] begins an example; None: [CLS], and [SEP] after all pieces
    closed: NDArray[np.bool_] | None = None

    def sizes(self, pieces: Any = slice(None)) -> I64:
        """Tokens of these pieces, each with the [SEP] that follows it."""
        closed = 1 if self.closed is None else self.closed[pieces]
        return self.ends[pieces] - self.starts[pieces] + closed

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> I64:
        """(E,) tokens of each example with its special ones."""
        ends = np.concatenate([[0], np.cumsum(self.sizes())])
        return np.diff(ends[self.offsets]) + (self.closed is None)


def sentence_pairs(
    shards: Shards,
    documents: I64,  # (D,) document numbers
    *,
    max_length: int,
    short_seq_prob: float = 0.1,
    seed: int = 0,
    epoch: int = 0,
) -> Examples:
    """BERT's examples for next-sentence prediction (Devlin et al. 2018, appendix A.2).

    Sentences are taken until they fill max_length (a random shorter length for `short_seq_prob` of the examples) and
    cut at a random sentence into A and B. Half of the examples keep B, the others take it from a random other document
    and leave the sentences of the old B to the next example; every two consecutive examples are one of each kind, so
    the halves are equal to within one per 2**20 sentences. Examples begin with at least two sentences whichever kind
    they are, so a document's last single sentence is left out of the epoch. Raises ValueError for fewer than two
    documents or none with two sentences.
    """
    if len(documents) < 2:
        raise ValueError(
            f"next-sentence prediction needs at least 2 documents, there are {len(documents)}: add some, say what "
            "separates them, or use recipe roberta"
        )
    purposes = rng.Purpose.PAIRS, rng.Purpose.RANDOM_NEXT
    keys = tuple(rng.derive(seed, epoch, purpose) for purpose in purposes)
    budget = max_length - 3
    found = [
        _pairs_block(shards, documents, block, budget, short_seq_prob, keys)
        for block in _blocks(shards, documents)
    ]
    examples = _join(found)
    if len(examples) == 0:
        raise ValueError("no document has two sentences to make a pair of: use recipe roberta")
    return examples


def _pairs_block(
    shards: Shards, documents: I64, block: slice, budget: int, short_seq_prob: float, keys: Any
) -> Examples:
    offsets = shards.sentences
    first, last = shards.documents[documents], shards.documents[documents + 1]
    owner = np.repeat(
        np.arange(len(documents))[block], (last - first)[block]
    )  # (S,) place in documents
    s = ranges(first[block], last[block])  # (S,) sentence numbers

    def draw(number: int, at: I64 = s) -> NDArray[np.float64]:
        return rng.uniform(keys[0], at * _DRAWS + number)

    short = 2 + (draw(_LENGTH) * (budget - 1)).astype(np.int64)
    target = np.where(draw(_SHORT) < short_seq_prob, short, budget)
    # one past the chunk: the sentence that reaches the target belongs to it, and at least two sentences do
    chunk = np.searchsorted(offsets, offsets[s] + target)
    chunk = np.minimum(np.maximum(chunk, s + 2), last[owner])
    split = s + 1 + (draw(_SPLIT) * (chunk - s - 1)).astype(np.int64)
    coins = rng.uniform(keys[1], s[::2]) < 0.5
    # a single sentence before the document's end makes no example of either kind
    local = np.arange(len(s))
    single = s + 1 == last[owner]
    following = np.where(single, 1, chunk - s) + local
    put_back = np.where(single, 1, split - s) + local
    at, random = _walk_pairs(following.tolist(), put_back.tolist(), single.tolist(), coins.tolist())

    s, target, chunk, split, owner = s[at], target[at], chunk[at], split[at], owner[at]
    other = (draw(_DOCUMENT, s) * (len(documents) - 1)).astype(np.int64)
    other += other >= owner
    start = first[other] + (draw(_START, s) * (last - first)[other]).astype(np.int64)
    rest = np.maximum(target - (offsets[split] - offsets[s]), 1)
    end = np.minimum(np.searchsorted(offsets, offsets[start] + rest), last[other])
    a = offsets[s], offsets[split]
    b = offsets[np.where(random, start, split)], offsets[np.where(random, end, chunk)]
    starts, ends = _truncate(a, b, budget, draw(_FRONT_A, s), draw(_FRONT_B, s))
    return Examples(starts, ends, np.arange(0, len(starts) + 1, 2), random.astype(np.int64))


def _walk_pairs(
    following: list[int], put_back: list[int], single: list[bool], coins: list[bool]
) -> tuple[I64, NDArray[np.bool_]]:
    """The sentences at which examples begin, and whether each one's B is random."""
    at: list[int] = []
    random: list[bool] = []
    i = 0
    while i < len(following):
        if single[i]:
            i += 1
            continue
        # the second of two examples is of the other kind than the first
        coin = coins[len(at) // 2] != (len(at) % 2 == 1)
        at.append(i)
        random.append(coin)
        i = put_back[i] if coin else following[i]
    return np.array(at, np.int64), np.array(random, bool)


def _truncate(
    a: tuple[I64, I64], b: tuple[I64, I64], budget: int, front_a: Any, front_b: Any
) -> tuple[I64, I64]:
    """Cut token ranges down to `budget` tokens together, always from the longer; pieces a0 b0 a1 b1 ... (2 E,).

    BERT flips a coin for every token it takes off the front or the back; here a uniform share comes off the front.
    """
    length_a, length_b = a[1] - a[0], b[1] - b[0]
    excess = np.maximum(length_a + length_b - budget, 0)
    cut_a = np.minimum(excess, np.maximum(length_a - length_b, 0))
    cut_b = np.minimum(excess, np.maximum(length_b - length_a, 0))
    both = excess - cut_a - cut_b
    cut_a, cut_b = cut_a + both // 2, cut_b + (both + 1) // 2
    off_a = (front_a * (cut_a + 1)).astype(np.int64)
    off_b = (front_b * (cut_b + 1)).astype(np.int64)
    starts = np.stack([a[0] + off_a, b[0] + off_b], 1)
    ends = np.stack([a[1] - cut_a + off_a, b[1] - cut_b + off_b], 1)
    return starts.ravel(), ends.ravel()


def full_sentences(
    shards: Shards,
    documents: I64,  # (D,) document numbers
    *,
    max_length: int,
    seed: int = 0,
    epoch: int = 0,
) -> Examples:
    """RoBERTa's FULL-SENTENCES (Liu et al. 2019, section 4.2): whole sentences packed up to max_length, without NSP.

    Documents come in a new random order every epoch; an example may cross from one into the next, with a separator
    between. A sentence longer than an example is cut. Raises ValueError for no document.
    """
    if len(documents) == 0:
        raise ValueError("there is no document to make examples of")
    key = rng.derive(seed, epoch, rng.Purpose.DOCUMENTS)
    order = documents[np.argsort(rng.bits(key, documents), kind="stable")]
    budget = max_length - 2
    return _join([_full_block(shards, order[block], budget) for block in _blocks(shards, order)])


def blocks(
    shards: Shards,
    documents: I64,  # (D,) document numbers
    *,
    max_length: int,
    seed: int = 0,
    epoch: int = 0,
) -> Examples:
    """GPT-2's blocks: documents end to end, each with a [SEP] behind it, cut after every max_length tokens.

    Documents come in a new random order every epoch. A last block of one token, which predicts nothing, is left out.
    Raises ValueError for no document.
    """
    if len(documents) == 0:
        raise ValueError("there is no document to make examples of")
    key = rng.derive(seed, epoch, rng.Purpose.DOCUMENTS)
    order = documents[np.argsort(rng.bits(key, documents), kind="stable")]
    first = shards.sentences[shards.documents[order]]  # (D,) tokens at which documents begin
    # in the stream of all tokens and [SEP]s
    bounds = np.concatenate(
        [[0], np.cumsum(shards.sentences[shards.documents[order + 1]] - first + 1)]
    )
    total = int(bounds[-1])
    cuts = np.append(np.arange(0, total, max_length), total)
    if total % max_length == 1:
        cuts = cuts[:-1]
    pieces = np.union1d(bounds[bounds < cuts[-1]], cuts)
    owner = np.searchsorted(bounds, pieces[:-1], side="right") - 1
    closed = pieces[1:] == bounds[owner + 1]
    shift = first[owner] - bounds[owner]
    offsets = np.searchsorted(pieces, cuts)
    return Examples(pieces[:-1] + shift, pieces[1:] + shift - closed, offsets, None, closed)


def _full_block(shards: Shards, documents: I64, budget: int) -> Examples:
    first, last = shards.documents[documents], shards.documents[documents + 1]
    s = ranges(first, last)
    owner = np.repeat(np.arange(len(documents)), last - first)
    # units: sentences, the long ones in parts
    begin, end = shards.sentences[s], shards.sentences[s + 1]
    parts = -((begin - end) // budget)
    starts = np.repeat(begin, parts) + ranges(np.zeros_like(parts), parts) * budget
    ends = np.minimum(starts + budget, np.repeat(end, parts))
    owner = np.repeat(owner, parts)
    # tokens plus separators grow with the unit, so the last unit that fits is found by bisection
    total = np.concatenate([[0], np.cumsum(ends - starts)])
    following = np.searchsorted(total[1:] + owner, total[:-1] + owner + budget, side="right")
    at = walk(following)
    pieces = np.union1d(at, np.flatnonzero(np.diff(owner, prepend=-1)))
    closing = np.append(pieces[1:], len(starts)) - 1
    offsets = np.append(np.searchsorted(pieces, at), len(pieces))
    return Examples(starts[pieces], ends[closing], offsets, None)


def walk(following: I64) -> I64:
    """The places visited from 0 on when place i leads to following[i] > i, up to the end."""
    steps = following.tolist()
    at = []
    i = 0
    while i < len(steps):
        at.append(i)
        i = steps[i]
    return np.array(at, np.int64)


def ranges(starts: I64, ends: I64) -> I64:
    """The integers of [starts[i], ends[i]) for every i, end to end."""
    lengths = ends - starts
    total = int(lengths.sum())
    return np.arange(total) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _blocks(shards: Shards, documents: I64) -> Iterator[slice]:
    """Slices of consecutive documents with about _BLOCK sentences each."""
    before = np.cumsum(shards.documents[documents + 1] - shards.documents[documents])
    block = before // _BLOCK
    edges = np.flatnonzero(np.diff(block)) + 1
    for start, end in zip([0, *edges], [*edges, len(documents)], strict=True):
        yield slice(int(start), int(end))


def _join(parts: list[Examples]) -> Examples:
    counts = np.cumsum([0] + [len(part.starts) for part in parts])
    offsets = [part.offsets[:-1] + count for part, count in zip(parts, counts, strict=False)]
    labels = [part.labels for part in parts if part.labels is not None]
    return Examples(
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.ends for part in parts]),
        np.concatenate([*offsets, counts[-1:]]),
        np.concatenate(labels) if labels else None,
    )
