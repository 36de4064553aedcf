"""Packed tokens: sequences laid end to end without padding; from padded tensors to packed ones and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.backend.torch_private import exporting
from fastbert.ops.context import untraced

# --- from values to indices: opaque ops, so that torch.compile breaks its graph here and nowhere else ---


def _mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    token = mask != 0
    return token, mask != token


def _mask_of_heads(mask: Tensor) -> tuple[Tensor, Tensor]:
    token = mask != 0
    return token, ~token[:, :1] & token.any(1, keepdim=True)


def _mask_of_heads4(mask: Tensor) -> tuple[Tensor, Tensor]:
    token, left = _mask_of_heads(mask)
    return token, left | (mask != token)


def _mask_of_beginnings(mask: Tensor) -> tuple[Tensor, Tensor]:
    token = mask != 0
    return token, token[:, 1:] & ~token[:, :-1]


def _mask_of_binary_beginnings(mask: Tensor) -> tuple[Tensor, Tensor]:
    token, follows = _mask_of_beginnings(mask)
    return token, torch.cat([follows, mask != token], 1)


def _key_padding(mask: Tensor) -> tuple[Tensor, Tensor]:
    token = mask == 0
    if mask.dtype == torch.bool:
        return token, token[:0]
    return token, ~token & (mask != float("-inf"))


# ways to read a mask (B, S). Each gives booleans (B, S), True at tokens, and booleans that are True where it is wrong
READINGS = {
    "mask": _mask,  # 1 at tokens, 0 at padding; other values are wrong
    "heads": _mask_of_heads,  # 0 at padding; sequences that begin with padding are wrong
    # also wrong: values other than 0 and 1, which transformers 4 and DeBERTa do not take for tokens
    "heads4": _mask_of_heads4,
    "beginnings": _mask_of_beginnings,  # 0 at padding; tokens that follow padding are wrong
    "binary_beginnings": _mask_of_binary_beginnings,  # also wrong: values other than 0 and 1
    "key_padding": _key_padding,  # True or -inf at padding; other numbers than 0 are wrong
}


def _fake_tokens(
    mask: Tensor, reading: str, ids: Tensor | None = None, padding_id: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    return (
        mask.new_empty(mask.shape[0] + 1, dtype=torch.int32),
        mask.new_empty(size(), dtype=torch.int64),
        mask.new_empty((size(), size(), size(), 0), dtype=torch.int32),
    )


@untraced("find_tokens", _fake_tokens)
def find_tokens(
    mask: Tensor, reading: str, ids: Tensor | None = None, padding_id: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A mask's tokens: cu_seqlens (B + 1,), rows (T,), and an empty tensor of shape (max_seqlen, wrong, hidden, 0).

    `wrong` counts wrong values; `hidden` counts the masked positions at which ids (B, S) is not padding_id. The three
    numbers are returned as a shape, since traced code can compute with sizes.
    """
    token, bad = READINGS[reading](mask)
    lengths = token.sum(1, dtype=torch.int32)
    cu_seqlens = tnf.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    if token.numel() == 0:
        return cu_seqlens, lengths.new_empty(0, dtype=torch.int64), lengths.new_empty(1, 0, 0, 0)
    counts = [cu_seqlens[-1], lengths.max(), bad.sum(dtype=torch.int32)]
    if ids is not None and ids.shape == mask.shape:
        counts.append(((ids != padding_id) & ~token).sum(dtype=torch.int32))
    total, longest, wrong, *hidden = torch.stack(counts).tolist()
    sizes = lengths.new_empty(max(longest, 1), wrong, *(hidden or (0,)), 0)
    return cu_seqlens, _places(token, total), sizes


def _places(flags: Tensor, total: int) -> Tensor:
    """Ascending positions (total,) at which the flattened booleans are True; no host sync on a GPU."""
    if flags.device.type == "cpu":
        return flags.flatten().nonzero().squeeze(1)
    # a stable sort moves True to the front, in order; nonzero would sync once more
    return torch.argsort((~flags).flatten().to(torch.uint8), stable=True)[:total]


def _fake_labelled(labels: Tensor, mask: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    return labels.new_empty(size(), dtype=torch.int64), labels.new_empty((size(), size(), 0))


@untraced("find_labelled", _fake_labelled)
def find_labelled(labels: Tensor, mask: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (R,) in the flat (B * S) of labels other than -100, and an empty tensor (outside, misshaped, 0).

    `outside` counts labels at padding; `misshaped` is 1 if the labels' shape does not fit values (B, S, ...).
    """
    labelled = labels != -100
    outside = labelled.new_zeros(())
    if mask is not None and mask.shape == labels.shape:
        outside = labelled & (mask == 0).to(labels.device)
    total, wrong = torch.stack([labelled.sum(), outside.sum()]).tolist()
    misshaped = int(labels.shape != values.shape[:2])
    return _places(labelled, total), labels.new_empty((wrong, misshaped, 0))


# --- packed tokens ---


@dataclass(frozen=True)
class Packing:
    """The positions of packed tokens (T, ...) in a padded batch (B, S, ...).

    `rows` is None if every column is a token. `length` is None if the caller passed packed tensors; outputs then stay
    packed. `max_seqlen` is at least the longest sequence's length.
    """

    cu_seqlens: Tensor  # (B + 1,) int32, running sums of the lengths
    max_seqlen: int
    rows: Tensor | None = None  # (T,) int64, the tokens' positions in the flat (B * S)
    length: int | None = None  # S

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def tokens(self) -> int:
        """T, the number of rows that `unpad` gives; not for packed tensors of the caller."""
        assert self.length is not None
        return self.batch * self.length if self.rows is None else self.rows.shape[0]

    @classmethod
    def full(cls, batch: int, length: int, device: torch.device) -> Packing:
        """A padded batch whose columns are all tokens; no host sync."""
        if exporting():
            return Padded.by(torch.ones(batch, length, dtype=torch.bool, device=device))
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return cls(bounds, length, None, length)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Packing:
        """Pack by a mask (B, S) that is 1 or True at tokens, with holes or padding on any side; one host sync.

        Raises ValueError for a mask of another shape or with other values.
        """
        packing, bad = cls.read(mask, "mask")
        if bad:
            raise ValueError(
                f"attention_mask holds {bad} values that are neither 0 nor 1: pass 1 at tokens and 0 at padding"
            )
        return packing

    @classmethod
    def read(cls, mask: Tensor, reading: str) -> tuple[Packing, int]:
        """Pack by a mask (B, S), read as READINGS[reading] says, and count its wrong values; one host sync."""
        if mask.dim() != 2:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}: pass (B, S), one value per token"
            )
        if exporting():
            return Padded.by(READINGS[reading](mask)[0]), 0
        return cls.found(find_tokens(mask, reading), mask.shape[1])

    @classmethod
    def found(cls, indices: tuple[Tensor, Tensor, Tensor], length: int) -> tuple[Packing, int]:
        """The packing from the result of find_tokens, and the number of wrong values."""
        cu_seqlens, rows, sizes = indices
        return cls(cu_seqlens, sizes.shape[0], rows, length), sizes.shape[1]

    @classmethod
    def given(cls, cu_seqlens: Tensor, max_seqlen: int | None) -> Packing:
        """Tokens that the caller has packed; no host sync. Raises ValueError or TypeError for wrong metadata."""
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(
                f"cu_seqlens is {type(cu_seqlens).__name__}: pass a tensor (B + 1,) int32 of running sums from 0"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}: pass (B + 1,) int32 running sums from 0"
            )
        if max_seqlen is None or isinstance(max_seqlen, (Tensor, float, str)):
            raise TypeError(
                f"max_seqlen is {type(max_seqlen).__name__}: pass the longest length as a Python int with cu_seqlens"
            )
        return cls(cu_seqlens, max_seqlen)

    def tail(self, tokens: int) -> Tensor:
        """(T,) True at rows past cu_seqlens[-1], which belong to no sequence."""
        return torch.arange(tokens, device=self.cu_seqlens.device) >= self.cu_seqlens[-1]

    def unpad(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (T, ...); packed tensors of the caller pass unchanged."""
        if self.length is None:
            return x
        flat = x.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def unpad_labels(self, labels: Tensor) -> Tensor:
        """`unpad` for labels: those outside of the sequences become -100."""
        if self.length is None:
            return labels.masked_fill(self.tail(labels.shape[0]), -100)
        return self.unpad(labels)

    def labelled(self, labels: Tensor, known: Tensor | None = None) -> Tensor:
        """Rows (R,) of the labels (T,) other than -100: `known` where given, else in order by one host sync."""
        return (labels != -100).nonzero().squeeze(1) if known is None else known

    def pad(self, y: Tensor) -> Tensor:
        """(T, ...) -> (B, S, ...) with zeros at padding; the caller's packed tensors only get zeros in the tail."""
        if self.length is None:
            tail = self.tail(y.shape[0])
            return y.masked_fill(tail.view(-1, *[1] * (y.dim() - 1)), 0.0)
        if self.rows is not None:
            places = self.batch * self.length
            y = y.new_zeros((places, *y.shape[1:])).index_copy(0, self.rows, y)
        return y.reshape(self.batch, self.length, *y.shape[1:])

    def spread(self, y: Tensor) -> Tensor:
        """(T, ...) -> (B, S, ...) as `pad`, also for the caller's packed tensors, with S = max_seqlen."""
        if self.length is not None:
            return self.pad(y)
        sequence, offset = self._coordinates(y.shape[0])
        places = self.batch * self.max_seqlen
        # rows past cu_seqlens[-1] go to one extra place at the end, which is cut off again
        place = torch.where(sequence < self.batch, sequence * self.max_seqlen + offset, places)
        grid = y.new_zeros((places + 1, *y.shape[1:])).index_copy(0, place, y)
        return grid[:places].reshape(self.batch, self.max_seqlen, *y.shape[1:])

    def positions(self, tokens: int) -> Tensor:
        """(T,) int64: every token's column in the padded layout, or its offset in its sequence where packed."""
        if self.rows is not None and self.length is not None:
            return self.rows % self.length
        if self.length is not None:
            return torch.arange(self.length, device=self.cu_seqlens.device).repeat(self.batch)
        return self._coordinates(tokens)[1]

    def first(self, x: Tensor) -> Tensor:
        """(T, C) -> (B, C): the first token of every sequence, zeros where a sequence has none."""
        return self.of_starts(x.index_select(0, self.starts(x.shape[0])))

    def lasts(self, tokens: int) -> Tensor:
        """(T,) True at the last token of every sequence."""
        sequence = self._coordinates(tokens + 1)[0]
        return sequence[1:] != sequence[:-1]

    def mean(self, x: Tensor) -> Tensor:
        """(T, C) -> (B, C): the mean of every sequence's tokens, zeros where a sequence has none."""
        tokens = self.spread(x.new_ones(x.shape[0], 1)).sum(1)  # (B, 1)
        return self.spread(x).sum(1) / tokens.clamp(min=1)

    def starts(self, tokens: int) -> Tensor:
        """(B,) rows of the sequences' first tokens, any row for an empty sequence; (0,) if there is no token at all."""
        if tokens == 0:
            return self.cu_seqlens.new_empty(0, dtype=torch.int64)
        return self.cu_seqlens[:-1].clamp(max=tokens - 1).to(torch.int64)

    def ends(self, tokens: int) -> Tensor:
        """(B,) rows of the sequences' last tokens, as `starts` those of the first."""
        if tokens == 0:
            return self.starts(tokens)
        return (self.cu_seqlens[1:] - 1).clamp(min=0).to(torch.int64)

    def of_starts(self, x: Tensor) -> Tensor:
        """(B, C): x at the rows `starts` or `ends`, with zeros where a sequence has no token."""
        if x.shape[0] == 0:
            return x.new_zeros((self.batch, x.shape[1])) + x.sum()
        return torch.where((self.cu_seqlens.diff() > 0)[:, None], x, 0.0)

    def _coordinates(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Each row's sequence number (T,) and offset in its sequence (T,); past the last sequence they are B and 0."""
        row = torch.arange(tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        sequence = torch.searchsorted(self.cu_seqlens[1:].contiguous(), row, right=True)
        offset = row - self.cu_seqlens.index_select(0, sequence)
        return sequence, torch.where(sequence < self.batch, offset, 0).to(torch.int64)


class Padded(Packing):
    """A batch (B, S) that keeps its padding, made while an exporter looks: no size depends on a value then.

    `cu_seqlens` is the mask, bool (B, S), True at tokens. Layers pass it on to functional.attention, which takes it in
    place of the running sums. What is computed at padding is set to zero by `pad`.
    """

    @classmethod
    def by(cls, token: Tensor) -> Padded:
        """The packing by a mask, bool (B, S)."""
        return cls(token, token.shape[1], None, token.shape[1])

    @property
    def batch(self) -> int:
        return self.cu_seqlens.shape[0]

    def unpad_labels(self, labels: Tensor) -> Tensor:
        return labels.masked_fill(~self.cu_seqlens, -100).flatten()

    def labelled(self, labels: Tensor, known: Tensor | None = None) -> Tensor:
        # all rows: their number must not depend on the labels, and a loss leaves out rows labelled -100. The numbers of
        # `known` count tokens alone
        return torch.arange(labels.shape[0], device=labels.device)

    def pad(self, y: Tensor) -> Tensor:
        grid = y.unflatten(0, self.cu_seqlens.shape)
        return grid.masked_fill(
            ~self.cu_seqlens.view(*self.cu_seqlens.shape, *[1] * (y.dim() - 1)), 0
        )

    def lasts(self, tokens: int) -> Tensor:
        rows = torch.arange(tokens, device=self.cu_seqlens.device)
        return (rows.view(self.batch, -1) == self.ends(tokens)[:, None]).flatten()

    def ends(self, tokens: int) -> Tensor:
        # the first one in the order from the right
        columns = self.max_seqlen - 1 - self.cu_seqlens.flip(1).to(torch.int32).argmax(1)
        return torch.arange(self.batch, device=columns.device) * self.max_seqlen + columns

    def starts(self, tokens: int) -> Tensor:
        columns = self.cu_seqlens.to(torch.int32).argmax(1)
        return torch.arange(self.batch, device=columns.device) * self.max_seqlen + columns

    def of_starts(self, x: Tensor) -> Tensor:
        return x.masked_fill(~self.cu_seqlens.any(1)[:, None], 0)
