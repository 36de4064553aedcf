"""A trained model on plain text: the words behind [MASK], and vectors of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert.data import load_tokenizer
from fastbert.data.tokenizer import SpecialIds, is_roberta
from fastbert.files import quoted
from fastbert.models.encoder import BertModel
from fastbert.models.heads import BertForMaskedLM


def packed(encodings: Sequence[Any]) -> dict[str, Any]:
    """Tokenised texts, laid end to end, as the keyword arguments of a model."""
    lengths = torch.tensor([len(e.ids) for e in encodings])
    return {
        "input_ids": torch.tensor([i for e in encodings for i in e.ids]),  # (T,)
        "token_type_ids": torch.tensor([i for e in encodings for i in e.type_ids]),  # (T,)
        "cu_seqlens": tnf.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),  # (B + 1,)
        "max_seqlen": int(lengths.max()),
    }


def plain_tokenizer(model: str | Path) -> Any:
    """The tokenizer in a model's folder, without the padding and truncation that its file may switch on."""
    tokenizer = load_tokenizer(model)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class Filler:
    """Fills masks with the model in a folder."""

    def __init__(self, model: str | Path) -> None:
        self.model = BertForMaskedLM.from_pretrained(model).eval()
        self.tokenizer = plain_tokenizer(model)
        self.mask = SpecialIds.of(self.tokenizer).mask

    @torch.no_grad()
    def __call__(self, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
        """The `top` most probable words with their probabilities, for each mask of a text in order.

        Raises ValueError for a text without [MASK], or one that is longer than the model's positions.
        """
        if top < 1:
            raise ValueError(f"top is {top}: it must be at least 1")
        token = self.tokenizer.id_to_token(self.mask)
        encoding = self.tokenizer.encode(text.replace("[MASK]", token))
        rows = [i for i, token_id in enumerate(encoding.ids) if token_id == self.mask]
        if not rows:
            raise ValueError(
                f"there is no [MASK] in {quoted(text)}: write one where a word is to be guessed"
            )
        logits: Tensor = self.model(**packed([encoding])).logits[rows]  # (masks, V)
        known = min(self.tokenizer.get_vocab_size(), logits.shape[1])
        found = logits.float().softmax(-1)[:, :known].topk(min(top, known))
        return [
            [(self._word(i), p) for i, p in zip(ids, probabilities, strict=True)]
            for ids, probabilities in zip(
                found.indices.tolist(), found.values.tolist(), strict=True
            )
        ]

    def _word(self, token_id: int) -> str:
        # byte-level tokens write bytes as other characters; WordPiece's ## marks a piece that continues a word
        if is_roberta(self.tokenizer):
            return str(self.tokenizer.decode([token_id], skip_special_tokens=False)).strip()
        return str(self.tokenizer.id_to_token(token_id))


class Embedder:
    """Makes vectors with the model in a folder; `cut` counts the texts that were too long for it."""

    def __init__(self, model: str | Path, pooling: str = "mean", normalize: bool = False) -> None:
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling is {quoted(pooling)}: choose mean or cls")
        # the pooled output is not used, and many checkpoints have none
        self.model = BertModel.from_pretrained(model, add_pooler=False).eval()
        self.tokenizer = plain_tokenizer(model)
        self.max_length: int = self.model.config.max_length
        self.pooling = pooling
        self.normalize = normalize
        self.cut = 0

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """(N, C) fp32, a row per text in order."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        self.tokenizer.no_truncation()
        encodings = self.tokenizer.encode_batch(list(texts))
        self.cut = sum(len(e.ids) > self.max_length for e in encodings)
        if self.cut:
            # the tokenizer cuts the texts itself, so that the special token at the end is kept
            self.tokenizer.enable_truncation(self.max_length)
            encodings = self.tokenizer.encode_batch(list(texts))
        order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
        vectors = torch.empty(len(encodings), self.model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors[rows] = self._pooled([encodings[i] for i in rows])
        return tnf.normalize(vectors) if self.normalize else vectors

    def _pooled(self, encodings: Sequence[Any]) -> Tensor:
        batch = packed(encodings)
        hidden = self.model(**batch).last_hidden_state.float()  # (T, C)
        bounds = batch["cu_seqlens"].long()
        if self.pooling == "cls":
            return hidden.index_select(0, bounds[:-1])
        lengths = bounds.diff()
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add_(0, owner, hidden)
        return sums / lengths[:, None]
