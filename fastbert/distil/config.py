"""DistilConfig: every setting of `fastbert distill`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from fastbert.distil.plan import KINDS, weights_of
from fastbert.files import SHARDS, existing, folder_or_new, quoted
from fastbert.train.settings import (
    BATCH,
    DATA,
    LOSSES,
    MODEL,
    OPTIMISER,
    RUN,
    TrainingSettings,
    setting,
)

# the first letters of a student whose layers are bidirectional LSTMs
RECURRENT = "lstm:"
_SIZES = re.compile(rf"\d+(x\d+){{1,3}}|{RECURRENT}\d+x\d+")
_existing = partial(existing, remedy="name a file of training data, or a folder of texts")


@dataclass
class DistilConfig(TrainingSettings):
    """The settings of a distillation; None has the meaning that the comment gives.

    Raises TypeError or ValueError, naming the setting, for values that can't be.
    """

    teacher: str | None = setting(
        None,
        DATA,
        "folder of the model to learn from: OUT of fastbert finetune or pretrain, or a checkpoint",
        path=True,
        positional=True,
    )
    sources: list[str] = setting(
        [],
        DATA,
        "training data: texts, labelled data of the teacher's task, or sentences",
        path=True,
        check=_existing,
    )
    data: str | None = setting(
        None, DATA, "text, labelled or sentences; default what the teacher was trained for"
    )
    validation: str | None = setting(
        None,
        DATA,
        "labelled, sentences: data to choose the best step by; default a part of the training data",
        path=True,
        check=_existing,
    )
    test: str | None = setting(
        None,
        DATA,
        "labelled, sentences: data to judge the best model on at the end",
        path=True,
        check=_existing,
    )
    heldout: float | None = setting(
        None, DATA, "part of the training data held out where no validation is given"
    )
    field: str = setting("text", DATA, "column of the text in .jsonl, .csv and .tsv files")
    separator: str | None = setting(
        None, DATA, "text: line that ends a document, '' for a blank one; default one per file"
    )
    max_length: int | None = setting(
        None, DATA, "tokens in the longest sequence; default the teacher's, or 128"
    )
    mask_prob: float = setting(0.15, DATA, "text: part of the tokens that is to be predicted")
    replaced: float = setting(
        0.0,
        DATA,
        "labelled: part of the tokens that is replaced by other tokens of the batch, anew in every epoch",
    )
    data_dir: str | None = setting(
        None,
        DATA,
        "text: folder of the tokenised shards, to share between runs; default OUT/data",
        path=True,
        check=partial(folder_or_new, remedy=SHARDS),
    )

    student: str | None = setting(
        None,
        MODEL,
        "sizes LAYERSxHIDDEN, such as 3x384, also with xHEADS or xHEADSxFFN; lstm:LAYERSxHIDDEN for a bidirectional "
        "LSTM; or a model folder",
        path=lambda text: not has_sizes(text),
    )
    start: str = setting(
        "teacher", MODEL, "teacher: its embeddings and some of its layers; or fresh weights"
    )
    layers: str | None = setting(
        None,
        MODEL,
        "teacher layers that a student starts from, such as 0,4,5; default even steps, first to last",
    )
    dropout: float | None = setting(None, MODEL, "of hidden states; default the teacher's")
    attention_dropout: float | None = setting(
        None, MODEL, "of attention weights; default the teacher's"
    )

    losses: str | None = setting(
        None,
        LOSSES,
        "names with weights, such as soft:5,labels:2; of soft, labels, cosine, hidden, attention, relations, vectors",
    )
    temperature: float = setting(2.0, LOSSES, "soft: scores are divided by it before the softmax")
    teacher_layer: int | None = setting(
        None, LOSSES, "relations: number of the teacher's layer, from 0; default the last"
    )
    relation_heads: int | None = setting(
        None, LOSSES, "relations: number of heads, which both widths are divided into"
    )
    int8: bool = setting(False, LOSSES, "compute the teacher in integers (CPU)")

    shards: int | None = setting(
        None, BATCH, "parts of a step's data that processes share; default their number"
    )
    batch_size: int | None = setting(None, BATCH, "sequences in a batch; default 32 without text")
    max_tokens: int | None = setting(None, BATCH, "text: tokens in a batch; default 8192")
    lr: float | None = setting(  # type: ignore[assignment]
        None, OPTIMISER, "peak learning rate; default 5e-4 for text, 1e-4 labelled, 2e-4 sentences"
    )
    metric: str | None = setting(
        None, RUN, "labelled: what the best step is chosen by; default the task's usual one"
    )
    patience: int = setting(
        0, RUN, "evaluations without a better one after which training stops, 0 for never"
    )
    eval_tokens: int = setting(65536, RUN, "text: held-out tokens of an evaluation, 0 for all")
    eval_every: int = setting(
        0, RUN, "steps between evaluations, 0 for one an epoch", zero_is_open=True
    )
    checkpoint_every: int = setting(
        0, RUN, "steps between checkpoints, 0 for one an epoch", zero_is_open=True
    )

    def _check(self) -> None:
        super()._check()
        self._check_choices({"data": (*KINDS, None), "start": ("teacher", "fresh")})
        self._check_shares("heldout", "dropout", "attention_dropout", "mask_prob", "replaced")
        self._check_least(0, "patience", "eval_tokens", "teacher_layer")
        above = ("batch_size", "max_tokens", "max_length", "temperature", "relation_heads")
        self._check_least(1, *above, "shards")
        # products of fp32 scores with its square are finite
        self._check_most({"temperature": 1e4})
        if self.max_length is not None and self.max_length < 8:
            raise ValueError(f"max_length is {self.max_length}: it must be at least 8")
        if self.max_tokens is not None and self.batch_size is not None:
            raise ValueError("max_tokens and batch_size are both set: a batch is measured by one")
        if self.losses is not None:
            weights_of(self.losses)
        if self.layers is not None:
            numbers_of(self.layers)

    @property
    def weights(self) -> dict[str, float]:
        """The losses' weights by name."""
        assert self.losses is not None
        return weights_of(self.losses)


def has_sizes(student: str) -> bool:
    """Whether a student is named by its sizes; else it is a folder."""
    return _SIZES.fullmatch(student) is not None


def numbers_of(text: str) -> list[int]:
    """Numbers of layers in a text such as "0,2,4"; raises ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"layers is {quoted(text)}: write numbers from 0 on, such as 0,2,4")
    return [int(part) for part in parts]
