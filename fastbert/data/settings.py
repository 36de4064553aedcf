"""The settings of training examples; the shards on disk depend on none of them."""

from __future__ import annotations

from dataclasses import dataclass

from fastbert.files import quoted


@dataclass(frozen=True)
class DataSettings:
    """How documents become masked batches; raises ValueError for a value that can't be."""

    recipe: str = (
        "bert"  # "bert": sentence pairs and NSP; "roberta": full sentences, masked LM only; "gpt":
        # blocks of tokens of one length, nothing is masked
    )
    max_length: int = 128  # tokens of a sequence, special ones included
    short_seq_prob: float = 0.1  # share of BERT's examples that aim at a shorter random length
    mask_prob: float = 0.15  # share of every sequence's tokens that is predicted
    whole_word: bool = False  # mask all pieces of a word together
    batch_size: int = 32  # sequences of a batch, of like lengths
    max_tokens: int | None = (
        None  # pack batches to at most this many tokens instead of batch_size sequences
    )
    heldout: float = 0.05  # share of the documents that is kept for evaluation; 0 keeps none
    seed: int = 0  # of pairs, masks and order
    split_seed: int = (
        0  # of the held-out documents, their pairs and masks: the same for runs with another seed
    )

    def __post_init__(self) -> None:
        if self.recipe not in ("bert", "roberta", "gpt"):
            raise ValueError(f"recipe is {quoted(self.recipe)}: choose bert, roberta or gpt")
        if self.max_length < 8:
            raise ValueError(f"max_length is {self.max_length}: it must be at least 8")
        if not 0.0 <= self.short_seq_prob <= 1.0:
            raise ValueError(f"short_seq_prob is {self.short_seq_prob}: it must be within [0, 1]")
        check_mask_prob(self.mask_prob)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")
        if self.max_tokens is not None and self.max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens is {self.max_tokens}: a batch must hold one sequence of max_length {self.max_length}"
            )
        if not 0.0 <= self.heldout < 1.0:
            raise ValueError(f"heldout is {self.heldout}: it must be within [0, 1)")
        for name in ("seed", "split_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")


def check_mask_prob(prob: float) -> None:
    """Raise ValueError unless `prob` is within (0, 1)."""
    if not 0.0 < prob < 1.0:
        raise ValueError(f"mask_prob is {prob}: it must be above 0 and below 1")
