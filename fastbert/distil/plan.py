"""Which losses a distillation has, and which parts of the student and of the teacher each of them compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fastbert.files import listed, quoted
from fastbert.models.config import BertConfig

# kinds of data, and the losses that each may have
KINDS = {
    "text": ("soft", "labels", "cosine", "hidden", "attention", "relations"),
    "labelled": ("soft", "labels", "cosine", "hidden", "attention", "relations"),
    "sentences": ("vectors", "cosine", "hidden", "attention", "relations"),
}
# what a loss is summed over: the labels, the tokens, the pairs of tokens inside of sequences, or the sequences
TERMS = {
    "labels": "labels",
    "soft": "labels",
    "cosine": "tokens",
    "hidden": "tokens",
    "attention": "pairs",
    "relations": "tokens",
    "vectors": "sequences",
}
# alone they train no part that an evaluation reads
UNJUDGED = {"attention", "relations"}


class LossSettings(Protocol):
    """The settings that a plan follows from (DistilConfig)."""

    data: str | None
    temperature: float
    teacher_layer: int | None
    relation_heads: int | None

    @property
    def weights(self) -> dict[str, float]:
        """The losses' weights by name."""


class Wanted(NamedTuple):
    """The signals that the losses need of one model."""

    hidden: tuple[int, ...] = ()
    projections: tuple[int, ...] = ()
    scores: bool = False
    vectors: bool = False
    own_loss: bool = False

    @property
    def encoder_alone(self) -> bool:
        """Whether nothing after the encoder's layers is needed."""
        return not (self.scores or self.vectors or self.own_loss)


@dataclass(frozen=True)
class Plan:
    """The losses with their weights, and which parts of the student and of the teacher they compare."""

    weights: dict[str, float]
    temperature: float
    # (student, teacher): numbers of hidden states, of which 0 is the embeddings' output, and of layers
    hidden: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int], ...]
    relations: tuple[tuple[int, int], ...]
    relation_heads: int

    @classmethod
    def of(cls, config: LossSettings, teacher: BertConfig, student: BertConfig) -> Plan:
        """The plan of a run's settings; raises ValueError for a loss that the data or the sizes do not allow."""
        check_losses(config, teacher, student)
        weights = config.weights
        pairs = tuple(attention_pairs(teacher, student))
        ends = student.num_hidden_layers, teacher.num_hidden_layers
        hidden = ((0, 0), *((s + 1, t + 1) for s, t in pairs)) if "hidden" in weights else ()
        if "cosine" in weights and ends not in hidden:
            hidden = (*hidden, ends)
        related = "relations" in weights
        return cls(
            weights,
            config.temperature,
            hidden,
            pairs if "attention" in weights else (),
            (relation_layers(config, teacher, student),) if related else (),
            relation_heads(config, teacher, student) if related else 1,
        )

    def wanted(self, side: int) -> Wanted:
        """The signals of the student, side 0, or of the teacher, side 1."""
        layers = {pair[side] for pair in (*self.attention, *self.relations)}
        return Wanted(
            tuple(sorted({pair[side] for pair in self.hidden})),
            tuple(sorted(layers)),
            scores="soft" in self.weights,
            vectors="vectors" in self.weights,
            own_loss="labels" in self.weights and side == 0,
        )


def weights_of(text: str) -> dict[str, float]:
    """{loss: weight} of a text such as "soft:5,labels:2,cosine"; raises ValueError for anything else."""
    known = tuple(dict.fromkeys(name for names in KINDS.values() for name in names))
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        try:
            weight = float(number or 1.0)
        except ValueError:
            weight = -1.0
        if name not in known or not 0.0 < weight < 1e9:
            raise ValueError(
                f"losses has {quoted(part)}: write one of {', '.join(known)}, with a weight above 0 such as soft:5"
            )
        if name in found:
            raise ValueError(f"losses names {name} twice: leave one of them out")
        found[name] = weight
    return found


def check_losses(config: LossSettings, teacher: BertConfig, student: BertConfig) -> None:
    """Raise ValueError for a loss that the data or the sizes do not allow."""
    assert config.data is not None
    for name in config.weights:
        if name not in KINDS[config.data]:
            raise ValueError(
                f"losses has {name} and the data is {config.data}: choose of {', '.join(KINDS[config.data])}"
            )
        if name == "cosine" and student.hidden_size != teacher.hidden_size:
            raise ValueError(
                f"losses has {name}, which needs equal widths, and the student is {student.hidden_size} wide and the "
                f"teacher {teacher.hidden_size}: choose hidden or relations, or a student of that width"
            )
    widths = student.hidden_size, teacher.hidden_size
    if config.data == "sentences" and "vectors" not in config.weights and widths[0] != widths[1]:
        raise ValueError(
            f"losses has no vectors, and the student is {widths[0]} wide and the teacher {widths[1]}: add vectors, "
            "which trains the map between them"
        )
    layers = teacher.num_hidden_layers, student.num_hidden_layers
    if 0 in layers and not {"soft", "labels", "vectors"} >= set(config.weights):
        raise ValueError("a model has no layers: choose of the losses soft, labels and vectors")
    for name in ("attention", "relations"):
        if name in config.weights and (teacher.recurrent or student.recurrent):
            raise ValueError(
                f"losses has {name}, and a model is an LSTM, which has no attention: choose soft, labels or hidden"
            )
    if "attention" in config.weights and student.num_hidden_layers > teacher.num_hidden_layers:
        raise ValueError(
            f"losses has attention, and the student has {student.num_hidden_layers} layers and the teacher "
            f"{teacher.num_hidden_layers}: every student layer needs one of its own"
        )
    if "attention" in config.weights and (teacher.rotary or student.rotary):
        raise ValueError(
            "losses has attention, whose scores have no rotary positions here, and a model has them: choose relations"
        )
    if "attention" in config.weights:
        pairs = attention_pairs(teacher, student)
        heads = [(student.layer_sizes[s][0], teacher.layer_sizes[t][0]) for s, t in pairs]
        if any(a != b or not a for a, b in heads):
            raise ValueError(
                f"losses has attention, which needs equal numbers of heads above 0, and they are "
                f"{listed(f'{a} and {b}' for a, b in heads)} (student and teacher): choose relations"
            )
    if "relations" in config.weights:
        relation_heads(config, teacher, student)


def attention_pairs(teacher: BertConfig, student: BertConfig) -> list[tuple[int, int]]:
    """(student layer, teacher layer): of as many even parts of the teacher's layers, the last layer of each part."""
    count, most = student.num_hidden_layers, teacher.num_hidden_layers
    return [(i, max((i + 1) * most // count - 1, 0)) for i in range(count)]


def relation_layers(
    config: LossSettings, teacher: BertConfig, student: BertConfig
) -> tuple[int, int]:
    """(student layer, teacher layer) of the relations: the student's last, and the setting or the teacher's last."""
    layer = config.teacher_layer
    return student.num_hidden_layers - 1, teacher.num_hidden_layers - 1 if layer is None else layer


def relation_heads(config: LossSettings, teacher: BertConfig, student: BertConfig) -> int:
    """The number of relation heads, by default the teacher's or the student's own.

    Raises ValueError where the layer or the widths do not allow it.
    """
    of_student, of_teacher = relation_layers(config, teacher, student)
    if of_teacher >= teacher.num_hidden_layers:
        raise ValueError(
            f"teacher_layer is {of_teacher}: the teacher has layers 0 to {teacher.num_hidden_layers - 1}"
        )
    heads = student.layer_sizes[of_student][0], teacher.layer_sizes[of_teacher][0]
    widths = heads[0] * student.head_size, heads[1] * teacher.head_size
    if 0 in widths:
        raise ValueError("losses has relations, and one of the layers has no heads left")
    count = config.relation_heads
    if count is None:
        count = next((h for h in heads[::-1] if not widths[0] % h and not widths[1] % h), 1)
    if widths[0] % count or widths[1] % count:
        raise ValueError(
            f"relation_heads is {count}: it must divide the width of the student's layer, {widths[0]}, and of the "
            f"teacher's, {widths[1]}"
        )
    return count
