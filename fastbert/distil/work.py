"""What differs between distillations on text and on labelled data: batches, a model's signals, and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.data import Batch, rng
from fastbert.data.tokenizer import SpecialIds
from fastbert.distil.config import DistilConfig
from fastbert.distil.models import Models
from fastbert.distil.plan import Wanted
from fastbert.distil.signals import Decoded, Signals, Tap
from fastbert.files import listed
from fastbert.finetune.classify import Classify, scale_of
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.data import Sources, load_data
from fastbert.finetune.features import items
from fastbert.finetune.judge import Part
from fastbert.finetune.loop import judge, training_data
from fastbert.models.checkpoint import check_whole
from fastbert.models.heads import BertForMaskedLM
from fastbert.models.inputs import prepare
from fastbert.nn.packing import Packing
from fastbert.pretrain.config import PretrainConfig
from fastbert.pretrain.evaluate import evaluate
from fastbert.pretrain.feed import shared_feed
from fastbert.train.session import Session
from fastbert.train.trainer import Stream
from fastbert.train.world import World

# the arguments of a head's loss in a batch
_LABELS = ("labels", "start_positions", "end_positions")


class Work(Protocol):
    """One kind of data, with the models that are trained on it."""

    tokenizer: Any
    # after `open`: the batches, and the number of them in an epoch, over all processes
    batches: Stream
    epoch: int
    # the value of an evaluation that the best step is chosen by, and whether more of it is better
    metric: str
    higher: bool

    @property
    def kind(self) -> Any:
        """The class of teacher and student."""

    def load_teacher(self) -> Any:
        """The teacher."""

    def open(self) -> None:
        """Make the batches."""

    def load_student(self, folder: Path) -> tuple[Any, nn.Module | None]:
        """A student that was saved, and the module after its encoder."""

    def head(self, width: int) -> nn.Module | None:
        """A module after a student's encoder that is trained too, for an encoder of this width; None: there is none."""

    def labels(self, batch: Batch) -> int:
        """The number of labels in a batch, of which each has a target of the teacher."""

    def signals(
        self, model: Any, batch: Batch, taps: Tap, wanted: Wanted, head: nn.Module | None = None
    ) -> Signals:
        """A model's signals on a batch; `taps` take those from inside of its encoder."""

    def judge(self, model: Any, head: nn.Module | None = None) -> dict[str, float]:
        """The values of an evaluation on the validation data."""

    def judge_test(self, model: Any, head: nn.Module | None = None) -> dict[str, float] | None:
        """The same on the test data, None where there is none."""

    def extras(self, head: nn.Module | None) -> list[Callable[[Path], None]]:
        """What is written into the folder of a student, beside its weights and its tokenizer."""

    def identity(self) -> dict[str, Any]:
        """What of the data must be the same when the run is resumed."""

    def describe(self) -> str:
        """The sizes of the data in a few words."""


class Numbered(Protocol):
    """The batches of an epoch by their numbers."""

    def __len__(self) -> int:
        """The number of batches in an epoch."""

    def batch(self, epoch: int, number: int) -> Batch:
        """One of them."""


class Divided:
    """The batches of one process, where several processes share the batches of an epoch.

    The last batches of an epoch are left out if there are fewer of them than parts.
    """

    def __init__(self, batches: Numbered, world: World) -> None:
        self.batches, self.world = batches, world

    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches without end from number `start` of `epoch` on."""
        shards = self.world.shards
        count = len(self.batches) // shards * shards
        # a checkpoint holds the main process's last batch: every process goes on after the whole step
        start = -(-start // shards) * shards
        while True:
            for first in range(start, count, shards):
                for part in self.world.parts:
                    yield self.batches.batch(epoch, first + part)
            epoch, start = epoch + 1, 0


class Replaced:
    """Batches in which other tokens take the place of some: each comes from a random place of its batch.

    Teacher and student see the same tokens, so that the teacher labels texts that the data lacks (Tang et al. 2019 mask
    words and take words from other texts to this end). Special tokens stay, and none is put anywhere.
    """

    def __init__(self, batches: Numbered, share: float, special: Sequence[int], seed: int) -> None:
        self.batches, self.share, self.special, self.seed = batches, share, special, seed

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, epoch: int, number: int) -> Batch:
        """Batch `number` of `epoch`; it depends on nothing else."""
        batch = self.batches.batch(epoch, number)
        ids = batch["input_ids"].numpy()
        key = rng.derive(self.seed, epoch, number, rng.Purpose.REPLACED)
        words = np.flatnonzero(~np.isin(ids, self.special))
        places = words[rng.uniform(key, words) < self.share]
        taken = words[rng.integers(key, places + len(ids), len(words))]
        found = ids.copy()
        found[places] = ids[taken]
        batch["input_ids"] = torch.from_numpy(found)
        return batch


class Text:
    """Plain text, of which some tokens are masked."""

    kind = BertForMaskedLM
    metric = "mlm_loss_masked"
    higher = False

    def __init__(self, s: Session[DistilConfig], models: Models) -> None:
        c = s.config
        self.config, self.world, self._session = c, s.world, s
        self.folder = models.encoder
        self.settings = PretrainConfig(
            sources=c.sources,
            separator=c.separator,
            field=c.field,
            heldout=c.heldout,  # type: ignore[arg-type]
            # full sentences and no pairs, as DistilBERT was trained
            recipe="roberta",
            max_length=c.max_length,  # type: ignore[arg-type]
            max_position=max(c.max_length or 0, 512),
            mask_prob=c.mask_prob,
            data_dir=c.data_dir,
            tokenizer=str(self.folder),
            batch_size=c.batch_size,
            max_tokens=c.max_tokens,
            eval_tokens=c.eval_tokens,
            seed=c.seed,
            split_seed=c.split_seed,
            steps=1,
        )

    def load_teacher(self) -> Any:
        model = BertForMaskedLM.from_pretrained(self.folder)
        if "soft" in self.config.weights:
            check_whole(model, self.folder)
        return model

    def open(self) -> None:
        """Tokenise the text into OUT/data, or open what is there, and make the batches."""
        s = self._session
        self.feed = shared_feed(self.settings, s.out, s.world, resume=s.resume, quiet=s.quiet)
        self.tokenizer = self.feed.tokenizer
        self.batches: Stream = self.feed.batches
        self.epoch = self.feed.train.num_batches(0) * s.world.shards

    def load_student(self, folder: Path) -> tuple[Any, nn.Module | None]:
        return BertForMaskedLM.from_pretrained(folder), None

    def head(self, width: int) -> nn.Module | None:
        return None

    def labels(self, batch: Batch) -> int:
        return len(batch["label_rows"])

    def signals(
        self, model: Any, batch: Batch, taps: Tap, wanted: Wanted, head: nn.Module | None = None
    ) -> Signals:
        found = taps.clear()
        inputs = prepare(model.config, **batch.inputs)
        labelled = batch["label_rows"]
        if wanted.encoder_alone:
            model.bert.encode(inputs, None if taps.whole else labelled[:0])
            return found
        e = model.bert.encode(inputs, None if taps.whole else labelled)
        x = e.x.index_select(0, labelled) if taps.whole else e.x
        mlm = model.mlm_head
        weight = model.bert.embeddings.word.weight if mlm.decoder is None else mlm.decoder.weight
        found.decoded = Decoded(mlm.transform(x), weight, mlm.bias)
        if wanted.own_loss:
            labels = batch["labels"].index_select(0, labelled)
            found.own_loss = F.mlm_loss(*found.decoded, labels, compacted=True, reduction="sum")
        return found

    def judge(self, model: Any, head: nn.Module | None = None) -> dict[str, float]:
        held_out = self.feed.held_out()
        return evaluate(model, held_out, self.feed.mask_id, self.config.precision, self.world)

    def judge_test(self, model: Any, head: nn.Module | None = None) -> dict[str, float] | None:
        return None

    def extras(self, head: nn.Module | None) -> list[Callable[[Path], None]]:
        return []

    def identity(self) -> dict[str, Any]:
        return dict(self.feed.identity())

    def describe(self) -> str:
        return self.feed.describe()


class Labelled:
    """Labelled data of the task that the teacher was fine-tuned for."""

    higher = True

    def __init__(self, s: Session[DistilConfig], models: Models, given: Sources) -> None:
        c, options, teacher = s.config, models.options, models.teacher
        self.config, self.world, self.folder = c, s.world, models.encoder
        assert options is not None
        assert c.max_length is not None
        assert c.batch_size is not None
        self.settings = FinetuneConfig(
            sources=c.sources,
            validation=c.validation,
            heldout=c.heldout or 0.0,
            test=c.test,
            task=options.task,
            text=options.text,
            pair=options.pair,
            label=options.label,
            tokens=options.tokens,
            tags=options.tags,
            max_length=c.max_length,
            stride=min(options.stride, c.max_length // 3),
            longest_answer=options.longest_answer,
            model=str(self.folder),
            split_seed=c.split_seed,
            batch_size=c.batch_size,
            seed=c.seed,
            precision=c.precision,
        )
        self.data = load_data(self.settings, given)
        # a student may leave questions unanswered where its teacher may, also if this data answers all
        task = self.data.task
        unanswerable = options.unanswerable or task.options.unanswerable
        task.options = replace(task.options, unanswerable=unanswerable)
        if task.names and task.names != teacher.labels:
            raise ValueError(
                f"the training data has the labels {listed(task.names)} and the teacher "
                f"{listed(teacher.labels)}: pass data with the teacher's labels"
            )
        if isinstance(task, Classify) and scale_of(teacher) != "softmax":
            raise ValueError(
                f"the teacher in {c.teacher} gives no classes that exclude each other ({teacher.problem_type}): its "
                "scores are no soft targets"
            )
        self.kind = task.kind
        self.metric: str = c.metric or task.metric
        self.tokenizer = self.data.tokenizer

    def load_teacher(self) -> Any:
        model = self.kind.from_pretrained(self.folder)
        check_whole(model, self.folder)
        return model

    def open(self) -> None:
        batches: Numbered = training_data(self.data, self.settings)
        check_divisible(len(batches), self.world)
        if self.config.replaced:
            special = SpecialIds.of(self.tokenizer).all
            batches = Replaced(batches, self.config.replaced, special, self.config.seed)
        self.batches: Stream = Divided(batches, self.world)
        self.epoch = len(batches)

    def load_student(self, folder: Path) -> tuple[Any, nn.Module | None]:
        return self.kind.from_pretrained(folder), None

    def head(self, width: int) -> nn.Module | None:
        return None

    def labels(self, batch: Batch) -> int:
        return items(batch)

    def signals(
        self, model: Any, batch: Batch, taps: Tap, wanted: Wanted, head: nn.Module | None = None
    ) -> Signals:
        found = taps.clear()
        if wanted.encoder_alone:
            prepared = prepare(model.config, **batch.inputs)
            rows = None if taps.whole else prepared.positions[:0]
            model.bert.encode(prepared, rows)
            return found
        given = {k: batch[k] for k in _LABELS if k in batch and wanted.own_loss}
        output = model(**batch.inputs, **given, output_hidden_states=taps.whole)
        if wanted.scores:
            found.scores = _scores(output, batch)
        if wanted.own_loss:
            found.own_loss = output.loss * items(batch)
        return found

    def judge(self, model: Any, head: nn.Module | None = None) -> dict[str, float]:
        return self._judged(model, self.data.validation)

    def judge_test(self, model: Any, head: nn.Module | None = None) -> dict[str, float] | None:
        return None if self.data.test is None else self._judged(model, self.data.test)

    def _judged(self, model: Any, part: Part) -> dict[str, float]:
        return judge(model, self.data, part, self.settings)[0]

    def extras(self, head: nn.Module | None) -> list[Callable[[Path], None]]:
        return [self.data.task.options.save]

    def identity(self) -> dict[str, Any]:
        return self.data.identity()

    def describe(self) -> str:
        return self.data.describe()


def _scores(output: Any, batch: Batch) -> list[Tensor]:
    """The scores of a head that have a target: of sequences, of labelled tokens, or of starts and ends."""
    if output.logits is None:
        # a softmax over the tokens of each sequence
        packing = Packing(batch["cu_seqlens"], batch["max_seqlen"])
        token = packing.spread(torch.ones_like(output.start_logits, dtype=torch.bool))
        least = torch.finfo(output.start_logits.dtype).min / 4
        both = (output.start_logits, output.end_logits)
        return [packing.spread(scores).masked_fill(~token, least) for scores in both]
    return [output.logits[batch["labels"] != -100]]


def check_divisible(batches: int, world: World) -> None:
    """Raise ValueError where an epoch has fewer batches than parts of a step's data."""
    if batches < world.shards:
        raise ValueError(
            f"an epoch has {batches} batches and a step's data {world.shards} parts: lower batch_size or the number of "
            "processes"
        )
