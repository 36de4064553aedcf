"""Pretraining steps: masked words and, with BERT's recipe, next sentences; next words with GPT's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert.data import Batch
from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.evaluate import judge
from fastbert.train.session import autocast
from fastbert.train.trainer import Stream, Trainer
from fastbert.train.world import World


class PretrainTrainer(Trainer):
    """Steps on packed batches; each loss is the sum over its terms / their number, over all batches and processes."""

    config: PretrainConfig

    def __init__(
        self, model: nn.Module, data: Stream, config: PretrainConfig, world: World | None = None
    ) -> None:
        gpt = config.recipe == "gpt"
        # a CUDA graph's labels are not those of next tokens
        self.replayable = not gpt
        super().__init__(model, data, config, world)
        word = "lm_loss" if gpt else "mlm_loss"
        self.losses = (word, "nsp_loss") if config.next_sentence else (word,)
        # evaluates one held-out batch; it reads weights outside of the model's forward
        self.judge = self.spread.bound(judge)

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """The numbers of labelled tokens and of sentence pairs in the whole step, over all processes."""
        own = sum(len(b["label_rows"]) for b in batches), sum(_pairs(b) for b in batches)
        labelled, pairs = self.world.totals(*own)
        counts = {"num_items_in_batch": max(int(labelled), 1)}
        if pairs:
            counts["num_pairs_in_batch"] = int(pairs)
        return counts

    def backward(self, batch: Batch, counts: dict[str, int]) -> Tensor:
        """Add one batch's gradients; returns its losses, sums / the number of terms in the whole step."""
        call: Any = self._replayed or self.spread.call
        with autocast(self.device, self.config.precision):
            output = call(**batch, **counts)
        if self._replayed is None:
            # gradients become means over the processes, and their sum is needed
            (output.loss * self.world.size).backward()
        if len(self.losses) == 1:
            return output.loss[None].detach().double()
        return torch.stack([output.mlm_loss, output.nsp_loss]).detach().double()


def _pairs(batch: Batch) -> int:
    answers = batch.get("next_sentence_label")
    return 0 if answers is None else len(answers)
