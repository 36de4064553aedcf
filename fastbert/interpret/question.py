"""What is explained: a score of a model on a tokenised text, or on two of them, and on texts with tokens left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.files import quoted
from fastbert.nn.base import evaluating
from fastbert.nn.int8 import Int8Embedding
from fastbert.runners.replace import is_replaced

# tokens in one forward
MOST_TOKENS = 8192
BASELINES = ("mask", "pad", "zero")
ABSENT = ("mask", "remove")

# the score (N,) of N variants of a text: of the model, its forward's arguments, and the packed rows (N, places) of the
# tokens that the target reads
Score = Callable[[Any, dict[str, Any], Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """A number that a model computes of a text, differentiable in its word embeddings."""

    name: str
    score: Score
    # the score reads the hidden states of these tokens, which no method changes; () for a mean of all tokens
    places: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Question:
    """A target on a text of S tokens; on two texts laid end to end where the target compares them.

    `model` is one of fastbert.bert. `fixed` tokens, such as [CLS] and [SEP], are never left out or changed, and have
    the score 0. `words` numbers the words that tokens are pieces of, None at special tokens; `offsets` are places in
    the text of the number `owners`.
    """

    model: Any
    target: Target
    ids: Tensor  # (S,) int64
    types: Tensor  # (S,) int64
    fixed: Tensor  # (S,) bool
    mask_id: int
    tokens: Sequence[str]
    texts: tuple[str, ...] = ("",)
    offsets: Sequence[tuple[int, int]] = ()
    words: Sequence[int | None] = ()
    owners: Sequence[int] = ()
    # tokens of each sequence that the model sees
    lengths: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.lengths:
            object.__setattr__(self, "lengths", (len(self.ids),))
        most = self.model.config.max_length
        if max(self.lengths) > most:
            raise ValueError(
                f"the text has {max(self.lengths)} tokens and the model takes {most}: shorten it"
            )
        known = self.model.config.vocab_size
        if len(self.ids) and int(self.ids.max()) >= known:
            raise ValueError(
                f"the text has token {int(self.ids.max())} and the model has {known} tokens, from 0 on: pass the "
                "tokenizer that it was trained with"
            )
        fixed = self.fixed.clone()
        fixed[list(self.target.places)] = True
        object.__setattr__(self, "fixed", fixed)
        if bool(fixed.all()):
            raise ValueError("the text has no word to explain: beside special tokens it is empty")

    @property
    def players(self) -> Tensor:
        """(n,) numbers of the tokens that are explained."""
        return (~self.fixed).nonzero().squeeze(1)

    def with_model(self, model: Any) -> Question:
        """The same question to another model of the same form."""
        return replace(self, model=model)

    # --- embeddings ---

    def embeddings(self) -> Tensor:
        """(S, C): the tokens' word embeddings."""
        return self._embedded(self.ids)

    def baseline(self, kind: str) -> Tensor:
        """(S, C): the embeddings with every token that is not fixed replaced by [MASK]'s, by [PAD]'s, or by zeros."""
        if kind not in BASELINES:
            raise ValueError(f"baseline is {quoted(kind)}: choose {', '.join(BASELINES)}")
        pad = self.model.config.pad_token_id or 0
        blank = self._embedded(self.ids.new_tensor([self.mask_id if kind == "mask" else pad]))
        blank = torch.zeros_like(blank) if kind == "zero" else blank
        return torch.where(self.fixed[:, None].to(blank.device), self.embeddings(), blank)

    @torch.no_grad()
    def _embedded(self, ids: Tensor) -> Tensor:
        word = self.model.bert.embeddings.word
        found = word(ids.to(self.model.device))
        return found.to(self.model.dtype) if isinstance(word, Int8Embedding) else found

    # --- scores ---

    @torch.no_grad()
    def scores(self, values: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """(N,) fp64 scores of N variants: ids (N, S) or embeddings (N, S, C), of which the tokens `keep` (N, S) stay.

        A token that does not stay is taken out of the packing: the model sees a shorter text.
        """
        if values is None:
            values = self.ids.expand(1 if keep is None else len(keep), -1)
        found = [
            self._forward(values[part], None if keep is None else keep[part])
            for part in self._parts(len(values))
        ]
        return torch.cat(found).double().cpu()

    def without(self, gone: Tensor, absent: str) -> Tensor:
        """(N,) fp64 scores with the tokens `gone` (N, S) taken out ("remove") or replaced by [MASK] ("mask")."""
        if absent not in ABSENT:
            raise ValueError(f"absent is {quoted(absent)}: choose {' or '.join(ABSENT)}")
        if absent == "remove":
            return self.scores(keep=~gone)
        return self.scores(torch.where(gone, self.mask_id, self.ids))

    def gradients(self, values: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(numbers, scores (n,), gradients (n, S, C)) of embeddings (N, S, C), some at a time."""
        for part in self._parts(len(values)):
            leaf = values[part].detach().requires_grad_()
            scores = self._forward(leaf)
            check_gradient(scores)
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
            yield part, scores.detach().double().cpu(), gradient

    def _parts(self, count: int) -> Iterator[slice]:
        size = max(1, MOST_TOKENS // max(len(self.ids), 1))
        return (slice(i, min(i + size, count)) for i in range(0, count, size))

    def _forward(self, values: Tensor, keep: Tensor | None = None) -> Tensor:
        given, rows = self.packed(values, keep)
        return self.target.score(self.model, given, rows)

    def packed(self, values: Tensor, keep: Tensor | None = None) -> tuple[dict[str, Any], Tensor]:
        """The arguments of the model's forward for N variants, packed, and the rows (N, places) of the target."""
        N, S = values.shape[:2]
        keep = torch.ones(N, S, dtype=torch.bool) if keep is None else keep
        lengths = torch.stack([k.sum(1) for k in keep.split(self.lengths, 1)], 1).flatten()
        device = self.model.device
        given: dict[str, Any] = {
            "inputs_embeds" if values.is_floating_point() else "input_ids": values.to(device)[
                keep.to(device)
            ],
            "token_type_ids": self.types.expand(N, S)[keep].to(device),
            "cu_seqlens": tnf.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32),
            "max_seqlen": max(int(lengths.max()), 1),
        }
        if (self.model.config.type_vocab_size or 0) < 2:
            given["token_type_ids"] = torch.zeros_like(given["token_type_ids"])
        rows = keep.flatten().cumsum(0).view(N, S)[:, list(self.target.places)] - 1
        return given, rows.to(device)


def check_gradient(score: Tensor) -> None:
    """Refuse a score through which no gradient goes."""
    if not score.requires_grad:
        raise ValueError(
            "the model records no gradient: pass one with floating-point weights, or a method that needs none, such as "
            "permutation"
        )


def why_not_gradients(model: Any) -> str | None:
    """Why a model gives no gradients of what it computes in inference."""
    if is_replaced(model):
        return "its weights are int8"
    if getattr(model.bert.frozen, "bits", None) is not None:
        return "it is quantised, and gradients would be those of its floating-point weights"
    return None


@contextmanager
def still(model: Any) -> Iterator[None]:
    """Evaluation mode, and no gradient of weights, inside; afterwards the model is as before."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
