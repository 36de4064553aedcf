"""GPT: the causal sister of the encoders, which predicts the next word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert.models.config import BertConfig
from fastbert.models.heads import LanguageModel
from fastbert.models.inputs import Inputs, prepare
from fastbert.models.output import Output
from fastbert.nn.blocks import MLMHead
from fastbert.nn.exports import fx_leaf


class NextWordHead(MLMHead):
    """The decoder to the vocabulary alone, without a transform and without a bias."""

    def __init__(self, hidden_size: int, vocab_size: int, tied: bool = True) -> None:
        nn.Module.__init__(self)
        self.register_parameter("bias", None)
        self.decoder = None if tied else nn.Linear(hidden_size, vocab_size, bias=False)

    def transform(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class GPTForCausalLM(LanguageModel):
    """GPT-2 (Radford et al. 2019) with its head for the next word; transformers' GPT2LMHeadModel.

    A token sees itself and the tokens before it in its sequence. Its encoder, a BertModel, is transformers' GPT2Model.
    """

    architecture = "GPTForCausalLM"
    causal = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.init_weights()

    def _language_head(self, config: BertConfig) -> MLMHead:
        return NextWordHead(config.hidden_size, config.vocab_size, config.tie_word_embeddings)

    @fx_leaf
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B, S) or (T,), -100 = not labelled
        return_logits: bool | None = None,
        label_rows: Tensor | None = None,  # (R,) int64
        num_items_in_batch: Tensor | int | None = None,
        token_type_ids: None = None,
        **options: Any,
    ) -> Output:
        """Score the next word of every token; `labels` are not shifted, usually they are input_ids.

        A token is scored against the label of the token that follows it in its sequence: the first label of a sequence
        does not count, and neither do labels at padding. transformers is the same where padding has the label -100 and
        stands on the right; on the left, it scores a text's first label against padding. With labels in training there
        are no logits, unless return_logits is True. `label_rows` are the packed row numbers of the tokens whose next
        token is labelled and save a host sync; the loss is the mean over them, or their sum / num_items_in_batch.
        Raises ValueError for token_type_ids.
        """
        if token_type_ids is not None:
            raise ValueError("token_type_ids are given: a gpt2 has no token types, leave them out")
        batch = (input_ids, attention_mask, None, position_ids, inputs_embeds)
        inputs = prepare(self.config, *batch, labels=labels, **options)
        inputs = _shifted(inputs, label_rows)
        e, loss, logits, _ = self._scored(inputs, return_logits, num_items_in_batch)
        return Output(
            loss=loss, logits=logits, hidden_states=e.hidden_states, attentions=e.attentions
        )


def _shifted(inputs: Inputs, known: Tensor | None) -> Inputs:
    """The inputs with every token's label that of the next token, and the labelled rows, found or `known`."""
    if inputs.labels is None:
        return inputs
    packing, labels = inputs.packing, inputs.labels
    if labels.shape[0] == 0:
        return inputs._replace(label_rows=inputs.positions)
    following = torch.cat([labels[1:], labels.new_full((1,), -100)])
    # no token follows the last one of a sequence
    following = following.masked_fill(packing.lasts(labels.shape[0]), -100)
    return inputs._replace(labels=following, label_rows=packing.labelled(following, known))
