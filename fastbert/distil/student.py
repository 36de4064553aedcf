"""The student: its weights, those of the teacher's layers that it starts from, and its losses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.data import Batch, load_tokenizer, vocabulary
from fastbert.distil.config import DistilConfig
from fastbert.distil.losses import Losses
from fastbert.distil.models import Models, chosen_layers, dropouts, student_of_sizes
from fastbert.distil.plan import Plan
from fastbert.distil.signals import Hooks, Signals
from fastbert.files import quoted
from fastbert.models.config import BertConfig
from fastbert.nn.packing import Packing


class Distillation(nn.Module):
    """A student and its losses as one module; calling it gives the losses of a batch.

    Its parameters are what is trained: the student's, and those of learned maps that the losses or the vectors need.
    """

    def __init__(self, student: nn.Module, plan: Plan, work: Any, teacher: BertConfig) -> None:
        super().__init__()
        self.student = student
        width = student.config.hidden_size  # type: ignore[union-attr]
        self.losses = Losses(plan, width, teacher.hidden_size)  # type: ignore[arg-type]
        self.head = work.head(width)
        self._work, self._wanted = work, plan.wanted(0)
        if self._wanted.encoder_alone:
            _keep_unread(student, plan)
        self._tap = Hooks(student.bert, self._wanted)

    def forward(self, batch: Batch, teacher: Signals, counts: dict[str, int]) -> Tensor:
        """(L,) the losses of a batch; `teacher` are the teacher's signals on it."""
        signals = self._work.signals(self.student, batch, self._tap, self._wanted, self.head)
        packing = Packing(batch["cu_seqlens"], batch["max_seqlen"])
        losses: Tensor = self.losses(signals, teacher, packing, counts)
        return losses

    def gradient_checkpointing_enable(self) -> None:
        """As the student's."""
        self.student.gradient_checkpointing_enable()  # type: ignore[operator]


def _keep_unread(student: Any, plan: Plan) -> None:
    """Let weights that no loss reads require no gradient: DistributedDataParallel would wait for it."""
    encoder = student.bert
    read = {*encoder.embeddings.parameters(), *encoder.layers.parameters()}
    if not plan.hidden:
        # relations and attention read no more of the last layer than queries, keys and values
        last = encoder.layers[-1]
        read -= {*last.parameters()} - {*last.attention.qkv.parameters()}
    for p in student.parameters():
        if p not in read:
            p.requires_grad_(False)


def build_student(
    config: DistilConfig, teacher: Any, kind: type, folder: Path | None = None
) -> Any:
    """A model of class `kind`: from a folder, or of given sizes, with the teacher's weights where these fit."""
    extra = {"add_pooler": False} if teacher.bert is teacher else {}
    if folder is not None:
        given: dict[str, Any] = dropouts(config)
        if hasattr(kind, "labels_per_token"):
            labels = ("num_labels", "id2label", "label2id")
            given |= {name: getattr(teacher.config, name) for name in labels}
            given |= {"problem_type": None}
        return kind.from_pretrained(folder, **given, **extra)  # type: ignore[attr-defined]
    student = kind(student_of_sizes(config, teacher.config), **extra)
    if config.start == "teacher":
        weights = teacher.state_dict()
        own = student.state_dict()
        with torch.no_grad():
            for name, key in copied(config, student, teacher).items():
                own[name].copy_(weights[key])
    return student


def copied(config: DistilConfig, student: Any, teacher: Any) -> dict[str, str]:
    """{a student's weight: the teacher's that it starts as}: those of the chosen layers, and others, of equal shapes.

    Layers are left out if the student's heads have another size.
    """
    layers = chosen_layers(config, teacher.config, student.config.num_hidden_layers)
    same_heads = student.config.head_size == teacher.config.head_size
    weights, found = teacher.state_dict(), {}
    for name, value in student.state_dict().items():
        prefix, place, rest = name.partition("layers.")
        key = name
        if place:
            number, _, rest = rest.partition(".")
            key = f"{prefix}layers.{layers[int(number)]}.{rest}"
        fits = key in weights and weights[key].shape == value.shape
        if fits and (same_heads or not place):
            found[name] = key
    return found


def check_vocabulary(config: DistilConfig, models: Models) -> None:
    """Raise ValueError where a tokenizer does not fit: the teacher's its model, or the student's the teacher's."""
    if config.data != "text" and models.student_folder is None:
        return
    theirs = vocabulary(load_tokenizer(models.encoder))
    # a mask puts any token of the tokenizer into the text
    if config.data == "text" and len(theirs) > models.teacher.vocab_size:
        raise ValueError(
            f"the teacher in {config.teacher} has {models.teacher.vocab_size} tokens and its tokenizer {len(theirs)}: "
            "copy the tokenizer that it was trained with"
        )
    if models.student_folder is None:
        return
    try:
        own = vocabulary(load_tokenizer(models.student_folder))
    except (FileNotFoundError, ValueError):
        # a folder without tokenizer: its vocabulary's size has been compared
        return
    if own != theirs:
        odd = [mine for mine, other in itertools.zip_longest(own, theirs) if mine != other]
        raise ValueError(
            f"the student in {config.student} has another vocabulary than the teacher, such as {quoted(odd[0])}: they "
            "need one tokenizer, or pass the student's sizes"
        )
