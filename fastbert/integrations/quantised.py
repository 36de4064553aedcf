"""validate(bits=...): a model against its quantised form, over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.backend import cpu
from fastbert.integrations.accelerate import accelerate, is_accelerated, restore
from fastbert.integrations.report import (
    Report,
    Row,
    at_tokens,
    check_tokens,
    kept,
    masks_of,
    medians,
    named,
    pair,
    run,
    speed,
)
from fastbert.runners.copies import Copies
from fastbert.runners.freeze import frozen_bytes, quantize

# the least mean cosine of an output's rows, and share of equal decisions, that count as agreement
COSINE, SAME = 0.999, 0.99

# the labels of the logits that a model returns, by their names
_LABELS = {
    "logits": "labels",
    "prediction_logits": "labels",
    "seq_relationship_logits": "next_sentence_label",
    "start_logits": "start_positions",
    "end_logits": "end_positions",
}
# logits that score each token of a text as the start or the end of an answer
_PLACES = ("start_logits", "end_logits")

Outputs = dict[str, Tensor]


def compare_quantised(model: nn.Module, batches: Any, rounds: int, bits: int) -> Report:
    """The rows of validate(model, batches, rounds, bits)."""
    was = is_accelerated(model)
    if reason := _why_not(model):
        raise ValueError(reason)
    report = Report(names=("unquantised", f"{bits} bits"))
    with kept(model), torch.no_grad():
        try:
            forms = _Forms(model, bits)
            agreement, first = _Agreement(model), None
            for number, batch in enumerate(_each(batches), 1):
                check_tokens(batch, f"batch {number}")
                first = batch if first is None else first
                agreement.add(batch, *(dict(named(forms.run(i, batch))) for i in (0, 1)))
            if first is None:
                raise ValueError("there are no batches: pass one, or an iterable of at least one")
            report.rows += agreement.rows()
            report.rows.append(forms.memory())
            works = [(lambda: None, lambda i=i: forms.run(i, first)) for i in (0, 1)]
            report.rows.append(speed("inference", medians(works, rounds)))
        finally:
            if not was:
                restore(model)
    return report


def _why_not(model: nn.Module) -> str | None:
    """Why a model can't be compared with its quantised form, None if it can."""
    name = type(model).__name__
    tensors = (*model.parameters(), *model.buffers())
    if any(t.dtype == torch.int8 for t in tensors):
        return f"the weights of this {name} are int8: load the model that they were made from"
    elsewhere = [t.device for t in tensors if t.device.type != "cpu"]
    if elsewhere:
        return f"the {name} is on {elsewhere[0]}: move it to the CPU, where quantised products run"
    return None if cpu.native is not None else str(cpu.unavailable)


def _each(batches: Any) -> Iterator[Any]:
    """The batches: a mapping, a tensor and a sequence of tensors are one batch, all else is an iterable of them."""
    one = isinstance(batches, Mapping | Tensor) or (
        isinstance(batches, list | tuple) and any(isinstance(b, Tensor) for b in batches)
    )
    if one:
        yield batches
    elif isinstance(batches, Iterable) and not isinstance(batches, str | bytes):
        yield from batches
    else:
        raise TypeError(
            f"batch is a {type(batches).__name__}: pass the forward's arguments as a dict, a tuple or a tensor, or an "
            "iterable of these"
        )


class _Forms:
    """A model as it is (0) and quantised (1). Copies of `freeze` serve the first, those of `quantize` do not."""

    def __init__(self, model: nn.Module, bits: int) -> None:
        self.model = model
        before = {m: vars(m).get("frozen") for m in model.modules()}
        try:
            quantize(model, bits)
        except TypeError:
            self._accelerated(bits)
        found = {m: vars(m).get("frozen") for m in model.modules()}
        self.copies = {m: c for m, c in found.items() if isinstance(c, Copies)}
        self.floats = {m: self._unquantised(before[m]) for m in self.copies}

    def _accelerated(self, bits: int) -> None:
        try:
            quantize(accelerate(self.model), bits)
        except TypeError:
            name = type(self.model).__name__
            raise ValueError(
                f"{name} holds no encoder that quantize() knows: there is nothing to compare"
            ) from None

    @staticmethod
    def _unquantised(copies: Any) -> Any:
        return copies if getattr(copies, "bits", None) is None else None

    def run(self, form: int, batch: Any) -> Any:
        """The output of this form for a batch."""
        for m, copies in (self.copies if form else self.floats).items():
            m.frozen = copies  # type: ignore[assignment]
        output = run(self.model, batch)
        if form and not frozen_bytes(self.model):
            raise ValueError(
                f"no layer of this {type(self.model).__name__} was quantised: the log fastbert says why, once, at the "
                "level INFO"
            )
        return output

    def memory(self) -> Row:
        """The bytes of the weights that were copied, and of the int8 copies."""
        weights = sum(t.nbytes for c in self.copies.values() for t in c.sources())
        copies = sum(c.nbytes() for c in self.copies.values())
        cells = f"{weights / 1e6:.2f} MB", f"{copies / 1e6:.2f} MB"
        return Row("encoder weights", *cells, f"{copies / weights:.2f} x", None)


# --- comparing ---


@dataclass
class _Rows:
    """One output, row by row."""

    count: int = 0
    total: float = 0.0  # of the rows' cosines
    least: float = 1.0
    largest: float = 0.0  # difference
    peaks: tuple[float, float] = (0.0, 0.0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count the rows of one batch: a vector each, or one of all numbers where an output has one a token."""
        x, y = (t.float().reshape(-1, t.shape[-1] if t.dim() > 1 else t.numel()) for t in (x, y))
        norms = x.norm(dim=1) * y.norm(dim=1)
        # two rows of zeros are equal
        cosines = torch.where(norms == 0, (x == y).all(1).float(), (x * y).sum(1) / norms)
        self.count += x.shape[0]
        self.total += float(cosines.double().clamp(max=1.0).sum())
        # not min() and max() of Python, which drop NaN
        self.least = float(torch.stack([cosines.min(), torch.tensor(self.least)]).min())
        found = torch.stack([(x - y).abs().max(), x.abs().max(), y.abs().max()])
        self.largest, *peaks = found.maximum(torch.tensor([self.largest, *self.peaks])).tolist()
        self.peaks = (peaks[0], peaks[1])

    def row(self, name: str, decided: bool) -> Row:
        """The table's row. Logits near 0 turn far without a change of the decision, by which they are judged."""
        mean = self.total / self.count
        difference = f"max {self.largest:.1e}, cosine mean {mean:.6f}, least {self.least:.6f}"
        figures = pair(*(f"max {p:.3g}" for p in self.peaks))
        # NaN never agrees, and argmax would make a decision of it
        agrees = None if decided and not math.isnan(mean) else mean >= COSINE
        return Row(name, *figures, difference, agrees)


@dataclass
class _Decisions:
    """The classes with the largest logit."""

    count: int = 0
    same: int = 0
    labelled: int = 0
    right: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, x: Tensor, y: Tensor, labels: Tensor | None) -> None:
        """Count the decisions x and y (N,) of one batch, and how many of each are right; a label below 0 is none."""
        self.count += x.numel()
        self.same += int((x == y).sum())
        if labels is not None:
            known = labels >= 0
            self.labelled += int(known.sum())
            for i, decided in enumerate((x, y)):
                self.right[i] += int((decided == labels)[known].sum())

    def rows(self, name: str) -> Iterator[Row]:
        """The table's rows."""
        share = self.same / self.count
        difference = f"{self.same} of {self.count} the same, {share:.2%}"
        yield Row(f"decisions, {name}", "", "", difference, share >= SAME)
        if self.labelled:
            # it can't change by more than the decisions do
            x, y = (n / self.labelled for n in self.right)
            points = f"{100 * (y - x):+.2f} points, {self.labelled} labels"
            yield Row(f"accuracy, {name}", f"{x:.2%}", f"{y:.2%}", points, None)


class _Agreement:
    """What two forms of a model give, over all batches."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs: dict[str, _Rows] = {}
        self.decisions: dict[str, _Decisions] = {}
        self.losses: list[tuple[float, float]] = []

    def add(self, batch: Any, x: Outputs, y: Outputs) -> None:
        """Count one batch."""
        masks = masks_of(self.model, batch)
        for name in x:
            if x[name].dim() == 0:
                self.losses += [(float(x[name]), float(y[name]))] if name == "loss" else []
                continue
            pair = [at_tokens(name, t[name], masks) for t in (x, y)]
            if pair[0].numel():
                self.outputs.setdefault(name, _Rows()).add(pair[0], pair[1])
                self._decide(name, x[name], y[name], batch)

    def _decide(self, name: str, x: Tensor, y: Tensor, batch: Any) -> None:
        if name not in _LABELS or x.shape[-1] < 2:
            return
        given = batch if isinstance(batch, Mapping) else {}
        labels, masks = given.get(_LABELS[name]), masks_of(self.model, batch)
        if isinstance(labels, Tensor) and labels.is_floating_point():
            # a regression, or classes that are true or not each by itself
            return
        if name in _PLACES:
            chosen = [_places(t, given) for t in (x, y)]
        else:
            chosen = [at_tokens(name, t, masks).argmax(-1).flatten() for t in (x, y)]
            if isinstance(labels, Tensor) and labels.shape == x.shape[:-1]:
                labels = at_tokens("", labels, masks).flatten()
        if not (isinstance(labels, Tensor) and labels.shape == chosen[0].shape):
            labels = None
        self.decisions.setdefault(name, _Decisions()).add(chosen[0], chosen[1], labels)

    def rows(self) -> Iterator[Row]:
        """The table's rows."""
        for name, found in self.outputs.items():
            yield found.row(name, name in self.decisions)
            if name in self.decisions:
                yield from self.decisions[name].rows(name)
        if self.losses:
            x, y = torch.tensor(self.losses, dtype=torch.float64).mean(0).tolist()
            yield Row("loss", f"{x:.6f}", f"{y:.6f}", f"{y - x:+.1e}", None)


def _places(scores: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The place (B,) of the largest score in each text: of (B, S) at tokens, or of packed scores (T,)."""
    if scores.dim() == 1:
        bounds = batch["cu_seqlens"].long()
        return torch.stack([part.argmax() for part in scores.split(bounds.diff().tolist())])
    mask = batch.get("attention_mask")
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -torch.inf)
    return scores.argmax(-1)
