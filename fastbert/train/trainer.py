"""A model with its optimiser, its data and its position: training steps, and all that the next one depends on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.data import Batch
from fastbert.train import store
from fastbert.train.evaluate import autocast
from fastbert.train.optim import learning_rate, make_optimiser, set_learning_rate
from fastbert.train.parallel import Spread
from fastbert.train.settings import TrainingSettings
from fastbert.train.world import World
from fastbert.training_graphs import TrainingRunner


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
    window_loss: float = 0.0
    window_mlm: float = 0.0
    window_nsp: float = 0.0
    window_tokens: int = 0
    window_seconds: float = 0.0


@dataclass
class StepResult:
    """The losses of one step, over all of its batches and processes."""

    loss: float
    mlm: float
    nsp: float
    norm: float
    tokens: int


class Trainer:
    """A model, its optimiser, its data and its position; `config.steps` is known.

    Here it pretrains; other losses override `_counts` and `_backward`.
    """

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
        fused = backend.forced() in (None, "triton", "cuda")
        graphs = self.device.type == "cuda" and fused and self.world.size == 1
        self._replayed = TrainingRunner(model) if graphs else None
        self._batches: Iterator[Batch] | None = None

    def take(self) -> list[Batch]:
        """The batches of the next step; the position moves past them."""
        if self._batches is None:
            self._batches = self.data.stream(self.at.epoch, self.at.batch)
        count = self.config.accumulate * len(self.world.parts)
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
        counts = self._counts(batches)
        parts = []
        for batch in batches:
            with self.spread.step_part(last=batch is batches[-1]):
                parts.append(self._backward(batch.to(self.device), counts))
        # an infinite limit measures and leaves the gradient alone
        norm_there = self.spread.clip(self.config.clip or math.inf)
        # one wait for the device in a step
        mlm, nsp, norm = torch.cat([torch.stack(parts).sum(0), norm_there.double()[None]]).tolist()
        own = sum(len(b["input_ids"]) for b in batches)
        mlm, nsp, tokens = self.world.totals(mlm, nsp, own)
        if not math.isfinite(mlm + nsp) or not math.isfinite(norm):
            self._refuse(mlm + nsp, norm, batches)
        at = self.at
        rate = learning_rate(at.step, self.steps, self.config.warmup_steps, self.config.lr)
        set_learning_rate(self.optimiser, rate)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        at.step += 1
        return StepResult(mlm + nsp, mlm, nsp, norm, int(tokens))

    def _counts(self, batches: list[Batch]) -> dict[str, int]:
        """The number of each loss's terms in the whole step, over all processes."""
        own = sum(len(b["label_rows"]) for b in batches), sum(_pairs(b) for b in batches)
        labelled, pairs = self.world.totals(*own)
        counts = {"num_items_in_batch": max(int(labelled), 1)}
        if pairs:
            counts["num_pairs_in_batch"] = int(pairs)
        return counts

    def _backward(self, batch: Batch, counts: dict[str, int]) -> Tensor:
        """Add one batch's gradients; returns its MLM and NSP losses, sums / the number of terms in the whole step."""
        call: Any = self._replayed or self.spread.call
        with autocast(self.device, self.config.precision):
            output = call(**batch, **counts)
        if self._replayed is None:
            # gradients come back as means over the processes, where sums are wanted
            (output.loss * self.world.size).backward()
        nsp = output.nsp_loss
        if nsp is None:
            return torch.stack([output.loss, torch.zeros_like(output.loss)]).detach().double()
        return torch.stack([output.mlm_loss, nsp]).detach().double()

    def _refuse(self, loss: float, norm: float, batches: list[Batch]) -> None:
        names = "; ".join(batch.identity for batch in batches)
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
        self.at = Position(**state["position"])
        self._batches = None
        store.restore_rng(state["rng"])


def _pairs(batch: Batch) -> int:
    answers = batch.get("next_sentence_label")
    return 0 if answers is None else len(answers)
