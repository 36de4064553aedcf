"""Batches of packed tokens as a model takes them, their padded form, and a collator for a caller's own examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from fastbert.data.masking import IGNORE, Masked, Masker

_INPUTS = ("input_ids", "token_type_ids", "cu_seqlens", "max_seqlen")


class Batch(dict[str, Any]):
    """A batch to call a model with, `model(**batch)`, with the numbers of its examples.

    Blocks for a GPT have no token_type_ids; their label_rows are the rows whose next token is labelled.

    Packed: input_ids, token_type_ids, labels (T,) int64; cu_seqlens (B + 1,) int32; max_seqlen, an int; label_rows (R,)
    int64; next_sentence_label (B,) int64, absent without NSP. Padded: see `pad_batch`.
    """

    epoch: int | None = None
    number: int | None = None
    examples: tuple[int, ...] = ()

    @property
    def identity(self) -> str:
        """Which batch this is, for an error report."""
        if self.epoch is None:
            return "a batch without number"
        return f"epoch {self.epoch}, batch {self.number}, examples {', '.join(map(str, self.examples))}"

    @property
    def tokens(self) -> int:
        """The number of tokens of its texts, and of patches of its images."""
        return len(self["input_ids"]) + len(self.get("patches", ()))

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of an encoder in a packed batch, without labels."""
        return {name: value for name, value in self.items() if name in _INPUTS}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to the GPU need not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> Batch:
        batch = Batch({k: change(v) if isinstance(v, Tensor) else v for k, v in self.items()})
        batch.epoch, batch.number, batch.examples = self.epoch, self.number, self.examples
        return batch


def packed_batch(
    masked: Masked,
    types: NDArray[np.int64] | None,  # (T,)
    cu_seqlens: NDArray[np.int64],  # (B + 1,)
    next_sentence: NDArray[np.int64] | None,  # (B,)
) -> Batch:
    """The packed batch of masked tokens."""
    batch = Batch(
        input_ids=torch.from_numpy(masked.input_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        labels=torch.from_numpy(masked.labels),
        label_rows=torch.from_numpy(masked.label_rows),
    )
    if types is not None:
        batch["token_type_ids"] = torch.from_numpy(types)
    if next_sentence is not None:
        batch["next_sentence_label"] = torch.from_numpy(next_sentence)
    return batch


def pad_batch(batch: Mapping[str, Any], pad_id: int, multiple_of: int = 1) -> Batch:
    """The padded form of a packed batch, with padding on the right.

    input_ids (B, S) with pad_id, attention_mask (B, S) 1 at tokens, token_type_ids (B, S) with 0, labels (B, S) with
    -100, all int64, and next_sentence_label if it is there. S is max_seqlen, rounded up to `multiple_of`.
    """
    bounds = batch["cu_seqlens"].long()
    lengths = bounds.diff()
    width = -(-batch["max_seqlen"] // multiple_of) * multiple_of
    mask = torch.arange(width, device=bounds.device) < lengths[:, None]
    padded = Batch(attention_mask=mask.long())
    for name, fill in (("input_ids", pad_id), ("token_type_ids", 0), ("labels", IGNORE)):
        if name in batch:
            tokens = batch[name]
            padded[name] = tokens.new_full(mask.shape, fill).masked_scatter_(mask, tokens)
    if "next_sentence_label" in batch:
        padded["next_sentence_label"] = batch["next_sentence_label"]
    if isinstance(batch, Batch):
        padded.epoch, padded.number, padded.examples = batch.epoch, batch.number, batch.examples
    return padded


class MLMCollator:
    """Makes a masked batch of encoded examples: a `collate_fn` for a DataLoader.

    An example is a list of ids, a `tokenizers.Encoding`, or a dict with input_ids and optionally attention_mask (0
    tokens are left out), token_type_ids and next_sentence_label. The masks come from torch's generator, so they are new
    in every epoch and follow torch.manual_seed. `padded` gives the padded form instead of the packed one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        mask_prob: float = 0.15,
        whole_word: bool = False,
        padded: bool = False,
        multiple_of: int = 1,
    ) -> None:
        self.masker = Masker(tokenizer, mask_prob, whole_word)
        self.padded = padded
        self.multiple_of = multiple_of

    def __call__(self, examples: Sequence[Any]) -> Batch:
        """Raises ValueError for no or empty examples, IndexError for ids outside the vocabulary."""
        if not examples:
            raise ValueError("there are no examples to make a batch of")
        found = [_example(example, number) for number, example in enumerate(examples)]
        ids = np.concatenate([ids for ids, _, _ in found])
        types = np.concatenate([types for _, types, _ in found])
        cu_seqlens = np.cumsum([0] + [len(ids) for ids, _, _ in found])
        keys = torch.randint(1 << 62, (len(found),)).numpy().astype(np.uint64)
        nexts = [label for _, _, label in found if label is not None]
        if nexts and len(nexts) < len(found):
            raise ValueError(
                f"next_sentence_label is in {len(nexts)} of {len(found)} examples: give it to all or none"
            )
        masked = self.masker(ids, cu_seqlens, keys)
        batch = packed_batch(masked, types, cu_seqlens, np.array(nexts) if nexts else None)
        return pad_batch(batch, self.masker.special.pad, self.multiple_of) if self.padded else batch


def _example(example: Any, number: int) -> tuple[NDArray[Any], NDArray[Any], int | None]:
    """The ids and types without padding, and the next-sentence label if there is one."""
    if isinstance(example, Encoding):
        example = {
            "input_ids": example.ids,
            "token_type_ids": example.type_ids,
            "attention_mask": example.attention_mask,
        }
    elif not isinstance(example, Mapping):
        example = {"input_ids": example}
    ids = np.asarray(example["input_ids"], np.int64)
    types = np.asarray(example.get("token_type_ids", np.zeros_like(ids)), np.int64)
    keep = np.asarray(example.get("attention_mask", np.ones_like(ids))) != 0
    if ids.ndim != 1 or types.shape != ids.shape or keep.shape != ids.shape:
        raise ValueError(
            f"example {number} has input_ids {ids.shape}, token_type_ids {types.shape}, attention_mask {keep.shape}: "
            "each must be one list of the same length"
        )
    if not keep.any():
        raise ValueError(f"example {number} has no tokens: leave it out")
    label = example.get("next_sentence_label")
    return ids[keep], types[keep], None if label is None else int(label)
