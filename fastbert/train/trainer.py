"""A model with its optimiser, its data and its position: training steps, and the state that the next one depends on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbert.backend import chooser
from fastbert.data import Batch
from fastbert.files import shortened
from fastbert.runners.training import TrainingRunner
from fastbert.train import store
from fastbert.train.optim import learning_rate, make_optimiser, set_learning_rate
from fastbert.train.parallel import Spread
from fastbert.train.settings import TrainingSettings
from fastbert.train.world import World


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and what is kept."""


class Stream(Protocol):
    """Training batches, such as fastbert.data.PretrainingData has them."""

    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches without end from number `start` of `epoch` on, always the same ones."""


@dataclass
class Position:
    """How far a run is, and the sums since its last log line; all of it is in a checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    evaluated: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window_steps: int = 0
    # sums of the losses by their names
    window: dict[str, float] = field(default_factory=dict)
    window_tokens: int = 0
    window_seconds: float = 0.0

    @classmethod
    def read(cls, saved: dict[str, Any], losses: Sequence[str]) -> Position:
        """The position in a checkpoint of a training with these losses.

        Checkpoints of version 0.1 hold three sums in fields of their own, also where a training has fewer losses.
        """
        saved = dict(saved)
        old = {name: saved.pop(field, None) for name, field in _OLD_SUMS.items()}
        if "window" not in saved:
            saved["window"] = {name: old[name] for name in ("loss", *losses)}
        return cls(**saved)


# the names of losses, and the fields in which checkpoints of version 0.1 hold their sums
_OLD_SUMS = {"loss": "window_loss", "mlm_loss": "window_mlm", "nsp_loss": "window_nsp"}


@dataclass
class StepResult:
    """The losses of one step, over all of its batches and processes."""

    # by name; "loss" is the sum of the others
    losses: dict[str, float]
    norm: float
    tokens: int

    @property
    def loss(self) -> float:
        """The loss that was trained."""
        return self.losses["loss"]


class Trainer:
    """A model, its optimiser, its data and its position; `config.steps` is known.

    A kind of training is a subclass that names its `losses` and has `counts` and `backward`.
    """

    # the losses whose sum is trained, in the order in which `backward` returns them
    losses: tuple[str, ...] = ("loss",)
    # whether a step on a GPU may be a CUDA graph of the model's own loss
    replayable = True

    def __init__(
        self, model: nn.Module, data: Stream, config: TrainingSettings, world: World | None = None
    ) -> None:
        assert config.steps is not None
        self.model = model
        self.data = data
        self.config = config
        self.steps: int = config.steps
        self.world = world or World()
        self.spread = Spread(model, self.world)
        self.optimiser = make_optimiser(model, config)
        self.at = Position()
        self.device = next(model.parameters()).device
        # a host takes longer to launch a step's kernels one by one than a GPU to run them
        graphs = self.replayable and self.device.type == "cuda" and chooser.captures()
        graphs = graphs and self.world.size == 1
        self._replayed = TrainingRunner(model) if graphs else None
        self._batches: Iterator[Batch] | None = None

    def take(self) -> list[Batch]:
        """The batches of the next step; the position moves past them."""
        if self._batches is None:
            self._batches = self.data.stream(self.at.epoch, self.at.batch)
        count = self.config.batches_of(self.at.step) * len(self.world.parts)
        batches = [next(self._batches) for _ in range(count)]
        last = batches[-1]
        assert last.epoch is not None
        assert last.number is not None
        self.at.epoch, self.at.batch = last.epoch, last.number + 1
        return batches

    def train_step(self) -> StepResult:
        """One optimiser step on the next batches; raises TrainingError, with the weights unchanged, if not finite."""
        self.model.train()
        batches = self.take()
        counts = self.counts(batches)
        parts = []
        for batch in batches:
            with self.spread.step_part(last=batch is batches[-1]):
                parts.append(self.backward(batch.to(self.device), counts))
        # with clip 0 the limit is infinite: the norm is measured and the gradient stays as it is
        norm_there = self.spread.clip(self.config.clip or math.inf)
        # the only wait for the device in a step
        *own, norm = torch.cat([torch.stack(parts).sum(0), norm_there.double()[None]]).tolist()
        *values, tokens = self.world.totals(*own, sum(b.tokens for b in batches))
        loss = sum(values)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._refuse(loss, norm, batches)
        at = self.at
        set_learning_rate(self.optimiser, learning_rate(at.step, self.config))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        at.step += 1
        by_name = dict(zip(self.losses, values, strict=True))
        return StepResult({"loss": loss, **by_name}, norm, int(tokens))

    def counts(self, batches: list[Batch]) -> dict[str, int]:
        """The number of each loss's terms in the whole step, over all processes, by any names."""
        raise NotImplementedError

    def backward(self, batch: Batch, counts: dict[str, int]) -> Tensor:
        """Add one batch's gradients; returns its `losses` in fp64, each its sum / the number of terms in the step."""
        raise NotImplementedError

    def _refuse(self, loss: float, norm: float, batches: list[Batch]) -> None:
        names = shortened("; ".join(batch.identity for batch in batches), 400)
        raise TrainingError(
            f"the loss is {loss} and the gradient's norm {norm} at step {self.at.step + 1} ({names}): training stops, "
            "and checkpoints of earlier steps are kept; a lower lr, a longer warmup or a smaller clip may help"
        )

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        if self.world.shards > 1:
            weights = self.spread.state(self.optimiser)
        else:
            weights = {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
            }
        return {
            **weights,
            "position": asdict(self.at),
            "rng": store.capture_rng(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        if self.world.shards > 1:
            self.spread.restore(state, self.optimiser)
        else:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
        self.at = Position.read(state["position"], self.losses)
        self._batches = None
        store.restore_rng(state["rng"])
