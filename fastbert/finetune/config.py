"""FinetuneConfig: every setting of `fastbert finetune`; Options: the part that predictions need."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from fastbert.files import RECORDS, existing, parse_json, read_text
from fastbert.models.config import BertConfig, model_folder
from fastbert.models.field_types import check_types
from fastbert.train.settings import (
    BATCH,
    DATA,
    MODEL,
    OPTIMISER,
    RUN,
    TrainingSettings,
    setting,
)

TASKS = ("classify", "tag", "answer")
METRICS = {
    "classify": ("accuracy", "f1"),
    "tag": ("f1", "precision", "recall", "accuracy"),
    "answer": ("f1", "exact"),
}
# holds the Options, in the folder of a trained model
OPTIONS_FILE = "finetune.json"
_existing = partial(existing, remedy=RECORDS)


@dataclass(frozen=True)
class Options:
    """How records become a model's inputs, and its outputs become predictions."""

    task: str
    max_length: int
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    tokens: str = "tokens"
    tags: str = "tags"
    stride: int = 0
    longest_answer: int = 30
    # whether the training data had questions without an answer
    unanswerable: bool = False
    # whether every Chinese or Japanese character was a word of its own in the training data
    characters: bool = True

    def save(self, folder: Path) -> None:
        """Write them into the folder of a model."""
        (folder / OPTIONS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Options | None:
        """The options in the folder of a model, or None; raises ValueError for a file that holds something else."""
        file = folder / OPTIONS_FILE
        if not file.is_file():
            return None
        try:
            found = cls(**parse_json(read_text(file)))
            check_types(found)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file} holds no options of fastbert finetune: {str(error)[:200]}"
            ) from error
        longest = found.max_length
        sizes = (
            8 <= longest < 2**31 and 0 <= found.stride <= longest // 3 and found.longest_answer >= 1
        )
        if found.task not in TASKS or not sizes:
            raise ValueError(
                f"{file} has a task, max_length, stride or longest_answer that fastbert finetune does not write: "
                "train again, or copy the file that belongs to the model"
            )
        return found


@dataclass
class FinetuneConfig(TrainingSettings):
    """The settings of a fine-tuning run; None has the meaning that the comment gives.

    Raises TypeError or ValueError, naming the setting, for values that can't be.
    """

    sources: list[str] = setting(
        [],
        DATA,
        "training data: .csv, .tsv, .jsonl, .json, .conll, or a folder of `datasets`",
        path=True,
        check=_existing,
    )
    validation: str | None = setting(
        None,
        DATA,
        "data to choose the best step by; default a part of the training data",
        path=True,
        check=_existing,
    )
    heldout: float = setting(
        0.1, DATA, "part of the training data taken for validation where none is given"
    )
    test: str | None = setting(
        None, DATA, "data to judge the best model on at the end", path=True, check=_existing
    )
    task: str | None = setting(
        None, DATA, "classify (texts or pairs), tag (tokens), or answer (questions on a text)"
    )
    text: str = setting("text", DATA, "classify: column of the text")
    pair: str | None = setting(None, DATA, "classify: column of the second text of a pair")
    label: str = setting("label", DATA, "classify: column of the label")
    tokens: str = setting("tokens", DATA, "tag: field of the list of words, outside of CoNLL files")
    tags: str = setting("tags", DATA, "tag: field of the list of tags, outside of CoNLL files")
    max_length: int | None = setting(
        None, DATA, "tokens in the longest sequence; default 128, and 384 for answer"
    )
    stride: int | None = setting(
        None, DATA, "answer: tokens that two parts of a long text share; default max_length / 3"
    )
    longest_answer: int = setting(30, DATA, "answer: tokens in the longest answer")

    model: str | None = setting(
        None, MODEL, "folder of the model to start from, with its tokenizer", path=True
    )
    dropout: float | None = setting(None, MODEL, "of hidden states; default the model's own")
    attention_dropout: float | None = setting(
        None, MODEL, "of attention weights; default the model's own"
    )

    epochs: float | None = setting(None, BATCH, "passes over the training data; default 3")
    batch_size: int = setting(32, BATCH, "sequences in a batch")
    lr: float = setting(5e-5, OPTIMISER, "peak learning rate")
    metric: str | None = setting(
        None,
        RUN,
        "what the best step is chosen by: accuracy, f1, ...; default the task's usual one",
    )
    patience: int = setting(
        0, RUN, "evaluations without a better one after which training stops, 0 for never"
    )
    split_seed: int = setting(0, RUN, "of the choice of held-out examples")
    eval_every: int = setting(
        0, RUN, "steps between evaluations, 0 for one an epoch", zero_is_open=True
    )
    checkpoint_every: int = setting(
        0, RUN, "steps between checkpoints, 0 for one an epoch", zero_is_open=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is None and self.steps is None:
            self.epochs = 3.0
        if self.max_length is None:
            self.max_length = 384 if self.task == "answer" else 128
        if self.stride is None:
            self.stride = self.max_length // 3
        self._check_lengths(self.max_length, self.stride)

    def _check(self) -> None:
        super()._check()
        self._check_choices({"task": (*TASKS, None)})
        if self.task is not None:
            self._check_choices({"metric": (*METRICS[self.task], None)})
        self._check_shares("heldout", "dropout", "attention_dropout")
        self._check_least(0, "patience", "stride")
        self._check_least(1, "batch_size", "max_length", "longest_answer")
        if self.validation is None and not self.heldout:
            raise ValueError("heldout is 0 and there is no validation: pass one of them")

    def check_readable(self, has_data: bool = False) -> None:
        """The checks that read nothing but the model's config.json; `has_data`: the training data is in memory."""
        for name, remedy in (
            ("task", "choose classify, tag or answer"),
            ("model", "name the folder of the model to start from"),
        ):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not said: {remedy}")
        if not has_data and not self.sources:
            raise ValueError(
                "sources is empty: name the file of the training data (in Python: or pass train=)"
            )
        assert self.model is not None
        assert self.max_length is not None
        base = BertConfig.from_file(model_folder(self.model))
        if reason := base.why_not_trained:
            raise ValueError(f"the model in {self.model} {reason}")
        if self.task == "answer" and base.causal:
            raise ValueError(
                f"task is answer and the model in {self.model} is a gpt2, whose tokens do not see those behind them: "
                "choose classify or tag, or another model"
            )
        if self.max_length > base.max_length:
            raise ValueError(
                f"max_length is {self.max_length} and the model in {self.model} has {base.max_length} positions: "
                "lower max_length"
            )
        self.check_paths()

    def _check_lengths(self, longest: int, stride: int) -> None:
        if longest < 8:
            raise ValueError(f"max_length is {longest}: it must be at least 8")
        if stride > longest // 3:
            raise ValueError(
                f"stride is {stride}: it must be at most a third of max_length {longest}"
            )

    def options(self, unanswerable: bool = False) -> Options:
        """The part that predictions need."""
        found = ("unanswerable", "characters")
        own = {f.name: getattr(self, f.name) for f in fields(Options) if f.name not in found}
        return Options(**own, unanswerable=unanswerable)


def trained_model(folder: str | Path) -> Path:
    """The model of a run, or the model folder itself; raises FileNotFoundError without one."""
    folder = model_folder(folder)
    if (folder / "config.toml").is_file() and not (folder / "model").is_dir():
        raise FileNotFoundError(f"{folder} is a run that has evaluated no model yet: wait for it")
    return folder / "model" if (folder / "model").is_dir() else folder
