"""One encoder of texts and images (ViLT): packed tokens, and the patches of an image behind each text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.models.config import BertConfig
from fastbert.models.heads import LanguageModel
from fastbert.models.images import patch_embedding
from fastbert.models.inputs import Inputs
from fastbert.models.losses import class_loss
from fastbert.nn.blocks import NSPHead
from fastbert.nn.packing import Packing


@dataclass
class MatchingOutput:
    """The results of a single stream; matching_logits (B, 2): 0 is a pair, 1 an image beside another's text."""

    loss: Tensor | None
    mlm_loss: Tensor | None
    matching_loss: Tensor | None
    matching_logits: Tensor
    logits: Tensor | None  # (R, V) at label_rows, if requested


class BertForImageText(LanguageModel):
    """One encoder of texts and images: [CLS] text [SEP] patches, with types 0 and 1; masked words and matching.

    A patch has the first row of the table of positions, and its own row and column (Kim et al. 2021, ViLT).
    """

    architecture = "BertForImageText"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooler=True)
        if (config.type_vocab_size or 0) < 2 or config.rotary:
            raise ValueError(
                "images beside text need two token types and a table of positions: set type_vocab_size to 2 and "
                "position_embedding_type to absolute"
            )
        self.patches = patch_embedding(config)
        self.matching_head = NSPHead(config.hidden_size)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor,  # (T,) int64
        cu_seqlens: Tensor,  # (B + 1,) int32
        max_seqlen: int,
        patches: Tensor,  # (P, 3 p p) uint8
        places: Tensor,  # (P, 2) int64
        patch_cu_seqlens: Tensor,  # (B + 1,) int32
        patch_max_seqlen: int,
        labels: Tensor | None = None,  # (T,) int64, -100 = not labelled
        label_rows: Tensor
        | None = None,  # (R,) int64, the labelled tokens' numbers among the text's
        matching_label: Tensor | None = None,  # (B,) int64, -100 = not asked
        num_items_in_batch: int | None = None,
        num_pairs_in_batch: int | None = None,
        return_logits: bool = False,
    ) -> MatchingOutput:
        """Score pairs, and masked words; losses are means, or sums / the numbers given.

        A matching_label of -100 asks nothing. The texts that are asked should have no masks: a mask that only pairs
        have, or only others, is an answer.
        """
        if len(cu_seqlens) != len(patch_cu_seqlens):
            pairs = len(patch_cu_seqlens) - 1, len(cu_seqlens) - 1
            raise ValueError(f"there are {pairs[0]} images and {pairs[1]} texts: pass pairs")
        if max_seqlen > self.config.max_length:
            raise ValueError(
                f"a text has {max_seqlen} tokens and the model {self.config.max_length} positions: truncate it"
            )
        x = self.patches(patches, places)
        packing = Packing.given(cu_seqlens + patch_cu_seqlens, max_seqlen + patch_max_seqlen)
        inputs, text_at = self._joined(input_ids, cu_seqlens, x, patch_cu_seqlens, packing)
        if labels is not None:
            if label_rows is None:
                label_rows = (labels != -100).nonzero().squeeze(1)
            everywhere = labels.new_full(inputs.positions.shape, -100)
            labels = everywhere.index_copy(0, text_at, labels)
            inputs = inputs._replace(labels=labels, label_rows=text_at[label_rows])
        scored = self._scored(inputs, False, num_items_in_batch, starts=True)
        e, mlm_loss, _, first = scored
        matching = self.matching_head(self.bert.pool(e.packing.of_starts(first)))
        loss = None
        if matching_label is not None:
            loss = class_loss(matching, matching_label, num_pairs_in_batch)
        losses = [term for term in (mlm_loss, loss) if term is not None]
        logits = None
        if return_logits and labels is not None:
            hidden = e.x[: len(e.x) - len(first)]
            logits = self.mlm_head(hidden, self.bert.embeddings.word.weight)
        total = sum(losses[1:], losses[0]) if losses else None
        return MatchingOutput(total, mlm_loss, loss, matching, logits)

    def _joined(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        x: Tensor,
        patch_cu_seqlens: Tensor,
        packing: Packing,
    ) -> tuple[Inputs, Tensor]:
        """The packed input of texts (T,), each before its image's patches, x (P, C); and the texts' rows (T,)."""
        bounds, others = cu_seqlens.long(), patch_cu_seqlens.long()
        text_at = torch.arange(len(ids), device=ids.device)
        offsets = text_at - _spread(bounds[:-1], bounds, len(ids))
        text_at = text_at + _spread(others[:-1], bounds, len(ids))
        patch_at = torch.arange(len(x), device=ids.device) + _spread(bounds[1:], others, len(x))
        words: Tensor = self.bert.embeddings.word(ids)
        both = words.new_zeros(len(ids) + len(x), words.shape[1])
        both = both.index_copy(0, text_at, words).index_copy(0, patch_at, x.to(words.dtype))
        positions = ids.new_zeros(len(both)).index_copy(0, text_at, offsets)
        types = ids.new_zeros(len(both)).index_fill(0, patch_at, 1)
        return Inputs(both, positions, types, packing, None, None, False, False), text_at


def _spread(values: Tensor, bounds: Tensor, rows: int) -> Tensor:
    """Each sequence's value at all of its rows."""
    return values.repeat_interleave(bounds.diff(), output_size=rows)
