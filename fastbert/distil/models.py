"""A teacher and a student as their files describe them, and the settings that follow from these."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.distil.config import RECURRENT, DistilConfig, has_sizes, numbers_of
from fastbert.distil.plan import KINDS, Plan, weights_of
from fastbert.distil.unused import check_used
from fastbert.files import quoted
from fastbert.finetune.config import METRICS, Options, trained_model
from fastbert.models.config import BertConfig, model_folder
from fastbert.models.names import FORMS

# the defaults of some settings, by kind of data
_DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {"losses": "soft:5,labels:2,cosine:1", "lr": 5e-4, "epochs": 3.0, "heldout": 0.05},
    "labelled": {"losses": "soft,labels,hidden", "lr": 1e-4, "epochs": 6.0, "heldout": 0.1},
    "sentences": {"losses": "vectors,hidden", "lr": 2e-4, "epochs": 6.0, "heldout": 0.05},
}
# ends of names of classes with a masked-LM head
_MASKED_LM = ("ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class Models:
    """What the files of a teacher and of a student say; `of` reads each of them once."""

    # the teacher's folder, of a run its model
    folder: Path
    # the folder of its encoder, the same one save in older versions of sentence-transformers
    encoder: Path
    teacher: BertConfig
    # None for a teacher that fastbert finetune did not train
    options: Options | None
    # None for a student of given sizes
    student_folder: Path | None
    student: BertConfig

    @classmethod
    def of(cls, config: DistilConfig) -> Models:
        """Read them. Raises FileNotFoundError or ValueError for a folder or sizes that can't be used."""
        assert config.teacher is not None
        assert config.student is not None
        folder = trained_model(model_folder(config.teacher))
        encoder = _encoder(folder)
        teacher, own = BertConfig.from_file(encoder), None
        if has_sizes(config.student):
            student = student_of_sizes(config, teacher)
        else:
            own = trained_model(_student_folder(config.student))
            student = dataclasses.replace(BertConfig.from_file(own), **dropouts(config))
            _check_student(config, student, teacher)
        return cls(folder, encoder, teacher, Options.load(folder), own, student)

    def kind(self, config: DistilConfig) -> str:
        """The kind of data: the setting, or what the teacher's files say; raises ValueError where they say nothing."""
        if config.data is not None:
            return config.data
        if self.options is not None:
            return "labelled"
        if (self.folder / "modules.json").is_file():
            return "sentences"
        name = self.class_name or "no named class"
        if name.endswith(_MASKED_LM):
            return "text"
        raise ValueError(
            f"the teacher in {config.teacher} is {name}, which says nothing of its use: pass data, one of "
            f"{', '.join(KINDS)}"
        )

    @property
    def class_name(self) -> str:
        """The name of the class that the teacher was saved from, "" where its file names none."""
        names = self.teacher.extra.get("architectures")
        return str(names[0])[:80] if isinstance(names, list) and names else ""


def usable(
    config: DistilConfig, out: Path, has_data: bool = False, has_validation: bool = False
) -> tuple[DistilConfig, Models]:
    """The settings of a new run, filled in, and its models; raises ValueError or FileNotFoundError for what can't be.

    Reads config.json and finetune.json alone. `has_data`, `has_validation`: this data is in memory.
    """
    for name, remedy in (
        ("teacher", "name the folder of the model to learn from"),
        ("student", "pass its sizes, such as 3x384, or a model folder"),
    ):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is not said: {remedy}")
    if not has_data and not config.sources:
        raise ValueError("sources is empty: name the training data (in Python: or pass train=)")
    models = Models.of(config)
    filled = filled_in(config, models, has_validation)
    if reason := models.teacher.why_not_trained:
        # a student starts from its floating-point weights
        raise ValueError(f"the teacher in {config.teacher} {reason}")
    Plan.of(filled, models.teacher, models.student)
    for name, model in (("teacher", models.teacher), ("student", models.student)):
        assert filled.max_length is not None
        if filled.max_length > model.max_length:
            raise ValueError(
                f"max_length is {filled.max_length} and the {name} has {model.max_length} positions: lower it"
            )
    config.check_paths()
    for name in ("teacher", "student"):
        # OUT/model would be found in the place of the folder's own model
        given = Path(getattr(config, name))
        places = (given, given / "model") if given.is_dir() else ()
        if any(out.resolve() == place.resolve() for place in places):
            raise ValueError(f"out is {out}, the {name}'s folder: choose another one")
    return filled, models


def filled_in(config: DistilConfig, models: Models, has_validation: bool = False) -> DistilConfig:
    """The settings with the defaults of their kind of data; raises ValueError for one that would not be used."""
    kind, options, teacher = models.kind(config), models.options, models.teacher
    found = {k: v for k, v in _DEFAULTS[kind].items() if getattr(config, k) is None}
    if config.steps is not None:
        found.pop("epochs", None)
    if config.validation is not None:
        found.pop("heldout", None)
    same_width = models.student.hidden_size == teacher.hidden_size
    if config.losses is None and kind == "text" and not same_width:
        found["losses"] = "soft:5,labels:2"
    losses, name = weights_of(config.losses or found["losses"]), models.class_name
    if kind == "text" and "soft" in losses and name and not name.endswith(_MASKED_LM):
        raise ValueError(
            f"the teacher in {config.teacher} is {name}, without the masked LM that the loss soft needs: leave it out "
            "of losses, or pass a teacher with one"
        )
    if kind == "labelled" and options is None:
        raise ValueError(
            f"the teacher in {config.teacher} has no finetune.json, which says what its task is: train it by fastbert "
            "finetune"
        )
    if config.max_length is None:
        own = 128 if options is None else options.max_length
        found["max_length"] = min(own, teacher.max_length, models.student.max_length)
    check_used(config, kind, set(losses), has_validation or config.validation is not None)
    if kind == "labelled" and options is not None:
        metrics = METRICS[options.task]
        if config.metric is not None and config.metric not in metrics:
            raise ValueError(
                f"metric is {quoted(config.metric)}: choose one of {', '.join(metrics)}"
            )
    if kind != "text" and config.batch_size is None:
        found["batch_size"] = 32
    elif config.batch_size is None and config.max_tokens is None:
        found["max_tokens"] = 8192
    return dataclasses.replace(config, data=kind, **found)


def student_of_sizes(config: DistilConfig, teacher: BertConfig) -> BertConfig:
    """The configuration of a student of given sizes; raises ValueError for sizes that can't be.

    Where they are left out, heads keep the teacher's head size and the feed-forward its ratio to the hidden size.
    """
    assert config.student is not None
    if config.student.startswith(RECURRENT):
        return _lstm_of_sizes(config, teacher)
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
            **dropouts(config),
        )
    except ValueError as error:
        raise ValueError(f"student is {quoted(config.student)}: {error}") from error


def _lstm_of_sizes(config: DistilConfig, teacher: BertConfig) -> BertConfig:
    """An LSTM's configuration with the teacher's vocabulary, token types and labels."""
    assert config.student is not None
    layers, hidden = map(int, config.student.removeprefix(RECURRENT).split("x"))
    # of the family's own names alone
    extra = {
        k: v for k, v in teacher.extra.items() if k not in ("model_type", "classifier_pooling")
    }
    try:
        return dataclasses.replace(
            teacher,
            model_type="lstm",
            num_hidden_layers=layers,
            hidden_size=hidden,
            max_position_embeddings=teacher.max_length,
            layer_heads=None,
            layer_widths=None,
            extra=extra,
            **FORMS["lstm"],
            **dropouts(config),
        )
    except ValueError as error:
        raise ValueError(f"student is {quoted(config.student)}: {error}") from error


def dropouts(config: DistilConfig) -> dict[str, Any]:
    """The fields of a student's configuration that the settings replace."""
    found = {
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }
    return {name: value for name, value in found.items() if value is not None}


def chosen_layers(config: DistilConfig, teacher: BertConfig, count: int) -> list[int]:
    """The teacher's layers that a student of so many starts from; raises ValueError for numbers that it lacks."""
    most = teacher.num_hidden_layers
    if config.layers is None:
        recurrent = config.student is not None and config.student.startswith(RECURRENT)
        if count > most and config.start == "teacher" and not recurrent:
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


def _encoder(folder: Path) -> Path:
    """The folder with the teacher's weights: of sentence-transformers that of its first module."""
    if (folder / "config.json").is_file() or not (folder / "modules.json").is_file():
        return folder
    # older versions of sentence-transformers put the encoder into a folder of its own
    return next((p.parent for p in sorted(folder.glob("0_*/config.json"))), folder)


def _student_folder(text: str) -> str:
    try:
        return str(model_folder(text))
    except FileNotFoundError:
        raise ValueError(
            f"student is {quoted(text)}: pass sizes LAYERSxHIDDEN[xHEADS[xFFN]], such as 3x384, lstm:LAYERSxHIDDEN, or "
            "an existing folder"
        ) from None


def _check_student(config: DistilConfig, student: BertConfig, teacher: BertConfig) -> None:
    """Raise ValueError for a student in a folder that can't be trained or has another number of tokens."""
    if reason := student.why_not_trained:
        raise ValueError(f"the student in {config.student} {reason}")
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"the student in {config.student} has {student.vocab_size} tokens and the teacher {teacher.vocab_size}: "
            "they need one vocabulary, or pass the student's sizes"
        )
