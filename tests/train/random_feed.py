"""Random batches in the collator's layout, a pure function of (epoch, number), to train on without text."""

import torch
from torch.nn import functional as tnf

from fastbert.bert import BertConfig, BertForPreTraining
from fastbert.data import Batch
from fastbert.pretrain.config import PretrainConfig

VOCAB, MASK = 97, 4


class RandomFeed:
    """Batches of sentence pairs of random ids and lengths; `per_epoch` of them in an epoch."""

    mask_id = MASK

    def __init__(self, sequences=6, per_epoch=4):
        self.sequences = sequences
        self.per_epoch = per_epoch

    def stream(self, epoch=0, start=0):
        while True:
            yield from (self.batch(epoch, n) for n in range(start, self.per_epoch))
            epoch, start = epoch + 1, 0

    def batch(self, epoch, number):
        g = torch.Generator().manual_seed(1000 * epoch + number)
        lengths = torch.randint(5, 25, (self.sequences,), generator=g)
        tokens = int(lengths.sum())
        ids = torch.randint(5, VOCAB, (tokens,), generator=g)
        labels = torch.where(torch.rand(tokens, generator=g) < 0.2, ids, -100)
        labels[0] = ids[0]
        masked = torch.where((labels >= 0) & (torch.rand(tokens, generator=g) < 0.8), MASK, ids)
        masked[0] = MASK
        starts = tnf.pad(lengths.cumsum(0), (1, 0))
        half = [torch.arange(n) >= n // 2 for n in lengths.tolist()]
        batch = Batch(
            {
                "input_ids": masked,
                "token_type_ids": torch.cat(half).long(),
                "cu_seqlens": starts.to(torch.int32),
                "max_seqlen": int(lengths.max()),
                "labels": labels,
                "label_rows": (labels >= 0).nonzero().squeeze(1),
                "next_sentence_label": torch.randint(0, 2, (self.sequences,), generator=g),
            }
        )
        batch.epoch, batch.number = epoch, number
        return batch

    def held_out(self):
        return [self.batch(99, i) for i in range(2)]


def small_config(**settings):
    """Settings for the small model below."""
    given = {"steps": 10, "lr": 3e-3, "log_every": 1, "threads": 1, "seed": 3}
    return PretrainConfig(**given | settings)


def small_model(dropout=0.1, seed=3, **sizes):
    """A model of two layers for RandomFeed's ids."""
    torch.manual_seed(seed)
    given = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        # larger than BERT's, so that ten steps move the loss
        "initializer_range": 0.1,
    }
    return BertForPreTraining(BertConfig(**given | sizes))
