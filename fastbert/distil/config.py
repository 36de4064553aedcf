"""DistilConfig: every setting of `fastbert distill`, and what follows from the teacher's folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastbert.distil.plan import KINDS, Plan, weights_of
from fastbert.files import SHARDS, existing, folder_or_new, quoted
from fastbert.finetune.config import METRICS, Options, trained_model
from fastbert.models.config import BertConfig, model_folder
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

# the defaults of some settings, by kind of data
_DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {"losses": "soft:5,labels:2,cosine:1", "lr": 5e-4, "epochs": 3.0, "heldout": 0.05},
    "labelled": {"losses": "soft,labels,hidden", "lr": 1e-4, "epochs": 6.0, "heldout": 0.1},
    "sentences": {"losses": "vectors,hidden", "lr": 2e-4, "epochs": 6.0, "heldout": 0.05},
}
_SIZES = re.compile(r"\d+(x\d+){1,3}")
# ends of names of classes with a masked-LM head
_MASKED_LM = ("ForMaskedLM", "ForPreTraining")
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
        "sizes LAYERSxHIDDEN, such as 3x384, also with xHEADS or xHEADSxFFN; or a model folder",
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
        self._check_shares("heldout", "dropout", "attention_dropout", "mask_prob")
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

    def check_readable(self, has_data: bool = False) -> None:
        """The checks that read nothing but the config.json files; `has_data`: the training data is in memory."""
        for name, remedy in (
            ("teacher", "name the folder of the model to learn from"),
            ("student", "pass its sizes, such as 3x384, or a model folder"),
        ):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not said: {remedy}")
        if not has_data and not self.sources:
            raise ValueError("sources is empty: name the training data (in Python: or pass train=)")
        config = filled_in(self)
        teacher = BertConfig.from_file(teacher_folder(config))
        if reason := teacher.why_not_trained:
            # a student starts from its floating-point weights
            raise ValueError(f"the teacher in {config.teacher} {reason}")
        student = student_config(config, teacher)
        Plan.of(config, teacher, student)
        for name, model in (("teacher", teacher), ("student", student)):
            assert config.max_length is not None
            if config.max_length > model.max_length:
                raise ValueError(
                    f"max_length is {config.max_length} and the {name} has {model.max_length} positions: lower it"
                )
        self.check_paths()

    def check_out(self, out: Path) -> None:
        """Refuse a folder that holds the teacher or the student: OUT/model would be found in its place."""
        for name in ("teacher", "student"):
            folder = Path(getattr(self, name))
            places = (folder, folder / "model") if folder.is_dir() else ()
            if any(out.resolve() == place.resolve() for place in places):
                raise ValueError(f"out is {out}, the {name}'s folder: choose another one")


def has_sizes(student: str) -> bool:
    """Whether a student is named by its sizes; else it is a folder."""
    return _SIZES.fullmatch(student) is not None


def numbers_of(text: str) -> list[int]:
    """Numbers of layers in a text such as "0,2,4"; raises ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"layers is {quoted(text)}: write numbers from 0 on, such as 0,2,4")
    return [int(part) for part in parts]


def teacher_folder(config: DistilConfig) -> Path:
    """The folder of the teacher's encoder: of a run its model, of sentence-transformers the part with the weights."""
    assert config.teacher is not None
    folder = trained_model(model_folder(config.teacher))
    if (folder / "config.json").is_file() or not (folder / "modules.json").is_file():
        return folder
    # older versions of sentence-transformers put the encoder into a folder of its own
    return next((p.parent for p in sorted(folder.glob("0_*/config.json"))), folder)


def data_kind(config: DistilConfig) -> str:
    """The kind of data: the setting, or what the teacher's files say; raises ValueError where they say nothing."""
    if config.data is not None:
        return config.data
    assert config.teacher is not None
    folder = trained_model(model_folder(config.teacher))
    if Options.load(folder) is not None:
        return "labelled"
    if (folder / "modules.json").is_file():
        return "sentences"
    name = _class_of(BertConfig.from_file(folder)) or "no named class"
    if name.endswith(_MASKED_LM):
        return "text"
    raise ValueError(
        f"the teacher in {config.teacher} is {name}, which says nothing of its use: pass data, one of "
        f"{', '.join(KINDS)}"
    )


def _class_of(model: BertConfig) -> str:
    """The name of the class that the model was saved from, "" where its file names none."""
    names = model.extra.get("architectures")
    return str(names[0])[:80] if isinstance(names, list) and names else ""


def filled_in(config: DistilConfig) -> DistilConfig:
    """The settings with the defaults of their kind of data; raises ValueError for one that the kind does not have."""
    kind = data_kind(config)
    found = {k: v for k, v in _DEFAULTS[kind].items() if getattr(config, k) is None}
    if config.steps is not None:
        found.pop("epochs", None)
    folder = teacher_folder(config)
    teacher = BertConfig.from_file(folder)
    student = student_config(config, teacher)
    if config.losses is None and kind == "text" and student.hidden_size != teacher.hidden_size:
        found["losses"] = "soft:5,labels:2"
    name = _class_of(teacher)
    losses = weights_of(config.losses or found["losses"])
    if kind == "text" and "soft" in losses and name and not name.endswith(_MASKED_LM):
        raise ValueError(
            f"the teacher in {config.teacher} is {name}, without the masked LM that the loss soft needs: leave it out "
            "of losses, or pass a teacher with one"
        )
    options = Options.load(folder)
    if kind == "labelled" and options is None:
        raise ValueError(
            f"the teacher in {config.teacher} has no finetune.json, which says what its task is: train it by fastbert "
            "finetune"
        )
    if config.max_length is None:
        own = 128 if options is None else options.max_length
        found["max_length"] = min(own, teacher.max_length, student.max_length)
    _check_settings(config, kind, METRICS[options.task] if options and kind == "labelled" else ())
    if kind != "text" and config.batch_size is None:
        found["batch_size"] = 32
    elif config.batch_size is None and config.max_tokens is None:
        found["max_tokens"] = 8192
    return dataclasses.replace(config, data=kind, **found)


def _check_settings(config: DistilConfig, kind: str, metrics: Sequence[str]) -> None:
    """Raise ValueError for a setting that this kind of data, or this student, has no use for."""
    if config.metric is not None and config.metric not in metrics:
        remedy = f"choose one of {', '.join(metrics)}"
        if not metrics:
            remedy = f"leave it out, the data is {kind}"
        raise ValueError(f"metric is {quoted(config.metric)}: {remedy}")
    if kind == "text":
        for name in ("validation", "test"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name} is set and the data is text: a part of it is held out, say heldout"
                )
    elif config.max_tokens is not None:
        raise ValueError(f"max_tokens is set and the data is {kind}: pass batch_size")
    elif any(Path(source).name == "-" for source in config.sources):
        raise ValueError(f"sources is -, standard input, and the data is {kind}: name a file")
    assert config.student is not None
    if config.layers is not None and config.start == "fresh":
        raise ValueError(
            f"layers is {quoted(config.layers)} and start is fresh: leave one of them out"
        )
    if not has_sizes(config.student) and (config.layers is not None or config.start == "fresh"):
        raise ValueError(
            f"layers or start is set and the student is the model in {config.student}, whose weights are trained "
            "further: leave them out, or pass the student's sizes"
        )


def student_config(config: DistilConfig, teacher: BertConfig) -> BertConfig:
    """The student's configuration, from its sizes or from its folder.

    Of sizes that are left out, heads keep the teacher's head size and the feed-forward its ratio to the hidden size.
    Raises ValueError for sizes that can't be, and for a model with another vocabulary.
    """
    assert config.student is not None
    dropouts = {
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }
    given: dict[str, Any] = {name: value for name, value in dropouts.items() if value is not None}
    if not has_sizes(config.student):
        found = BertConfig.from_file(trained_model(_student_folder(config.student)))
        if reason := found.why_not_trained:
            raise ValueError(f"the student in {config.student} {reason}")
        if found.vocab_size != teacher.vocab_size:
            raise ValueError(
                f"the student in {config.student} has {found.vocab_size} tokens and the teacher {teacher.vocab_size}: "
                "they need one vocabulary, or pass the student's sizes"
            )
        return dataclasses.replace(found, **given)
    sizes = [int(number) for number in config.student.split("x")]
    layers, hidden = sizes[:2]
    heads, ffn = (*sizes[2:], None, None)[:2]
    if heads is None:
        heads = max(hidden // teacher.head_size, 1)
    if ffn is None:
        ffn = max(hidden * teacher.intermediate_size // teacher.hidden_size, 1)
    numbers = chosen_layers(config, teacher, layers)
    same = (hidden, heads) == (teacher.hidden_size, teacher.num_attention_heads)
    own = [teacher.layer_sizes[i] for i in numbers]
    pruned = same and len(sizes) == 2 and config.start == "teacher"
    try:
        return dataclasses.replace(
            teacher,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=ffn,
            layer_heads=tuple(h for h, _ in own) if pruned and teacher.layer_heads else None,
            layer_widths=tuple(w for _, w in own) if pruned and teacher.layer_widths else None,
            **given,
        )
    except ValueError as error:
        raise ValueError(f"student is {quoted(config.student)}: {error}") from error


def _student_folder(text: str) -> str:
    try:
        return str(model_folder(text))
    except FileNotFoundError:
        raise ValueError(
            f"student is {quoted(text)}: pass sizes LAYERSxHIDDEN[xHEADS[xFFN]], such as 3x384, or an existing folder"
        ) from None


def chosen_layers(config: DistilConfig, teacher: BertConfig, count: int) -> list[int]:
    """The teacher's layers that a student of so many starts from; raises ValueError for numbers that it lacks."""
    most = teacher.num_hidden_layers
    if config.layers is None:
        if count > most and config.start == "teacher":
            raise ValueError(
                f"student is {quoted(config.student)} and the teacher has {most} layers: pass --start fresh, or fewer"
            )
        # the last layer gives what heads and pooling read: without it a student starts far from its teacher
        steps = count - 1
        return (
            [(i * (most - 1) + steps // 2) // steps for i in range(count)] if steps else [most - 1]
        )
    numbers = numbers_of(config.layers)
    if len(numbers) != count or max(numbers) >= most:
        raise ValueError(
            f"layers is {quoted(config.layers)}: name {count} of the teacher's layers, 0 to {most - 1}"
        )
    return numbers
