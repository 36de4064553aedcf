"""What validate() needs whichever forms of a model it compares: a table, a model's outputs, and its state kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.integrations.accelerate import AT_PADDING_ATTRIBUTE
from fastbert.integrations.known_families import FAMILIES
from fastbert.models.output import Output, SequenceOutput

NAMES = ("stock", "fastbert")


@dataclass(frozen=True)
class Row:
    """One comparison: a cell for each form of the model; `agrees` is None for what need not agree, such as speed."""

    what: str
    stock: str
    fastbert: str
    difference: str
    agrees: bool | None


@dataclass
class Report:
    """The comparisons that validate() made; prints as a table. `names` are the titles of a row's two cells."""

    rows: list[Row] = field(default_factory=list)
    names: tuple[str, str] = NAMES

    @property
    def agrees(self) -> bool:
        """Whether every row that has to agree does."""
        return all(row.agrees is not False for row in self.rows)

    def __str__(self) -> str:
        cells = [("", *self.names, "difference", "")]
        words = {True: "agrees", False: "DIFFERS", None: ""}
        cells += [(r.what, r.stock, r.fastbert, r.difference, words[r.agrees]) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in cells)
        return "\n".join(line.rstrip() for line in lines)


def pair(first: str, second: str) -> tuple[str, str]:
    """The two cells of a row, from any sequence of two."""
    return first, second


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for one batch: its forward's arguments by name, in order, or the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return model(*batch)
    raise TypeError(
        f"batch is a {type(batch).__name__}: pass the forward's arguments as a dict, a tuple or a tensor"
    )


def check_tokens(batch: Any, name: str) -> None:
    """Refuse a batch without a token: there is nothing to compare."""
    values: Iterable[Any] = [batch]
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, Iterable) and not isinstance(batch, Tensor):
        values = batch
    empty = next((t for t in values if isinstance(t, Tensor) and not t.numel()), None)
    if empty is not None:
        raise ValueError(
            f"{name} has a tensor of shape {tuple(empty.shape)}: pass a token at least"
        )
    mask = mask_of(batch)
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.any()):
        raise ValueError(
            f"{name} has no token, its attention_mask is 0 everywhere: pass one at least"
        )


def mask_of(batch: Any) -> Tensor | None:
    """The batch's attention mask, if it names one."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def named(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor of an output, with its name."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping | Output):
        for key in output.keys():  # noqa: SIM118 -- iterating over an Output gives its values
            yield from named(output[key], str(key))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for i, value in enumerate(output):
            yield from named(value, f"{name}[{i}]")


def masks_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """The batch's attention mask, and those of text and images together where models make one sequence of them."""
    found = [mask_of(batch)]
    for m in model.modules() if isinstance(batch, Mapping) else ():
        family = getattr(type(m), "fastbert_family", None) or FAMILIES.get(type(m).__module__)
        if family is None or family.sequence is None or family.kind(type(m).__name__) != "model":
            continue
        seen = family.sequence(m, dict(batch))
        found += [] if isinstance(seen, str) else [seen.get("attention_mask")]
    return [mask for mask in found if isinstance(mask, Tensor) and mask.dim() == 2]


def at_tokens(name: str, t: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """A tensor's values at tokens of the mask that fits: (B, S, ...) -> (T, ...); other shapes pass unchanged."""
    mask = next((mask for mask in masks if t.shape[:2] == mask.shape), None)
    # or as many classes or columns as the batch has positions
    if mask is None or (t.dim() == 2 and name in SequenceOutput.PER_SEQUENCE):
        return t
    return t[mask.to(t.device) != 0]


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside; afterwards restore all that comparisons change, except weights and classes."""
    modes = {m: m.training for m in model.modules()}
    attributes = [(vars(m), n) for m in model.modules() for n in ("frozen", AT_PADDING_ATTRIBUTE)]
    values = [(place, name, place.get(name), name in place) for place, name in attributes]
    gradients = {p: p.grad for p in model.parameters()}
    buffers = {b: b.clone() for b in model.buffers()}
    dropouts: list[tuple[nn.Module, str, float]] = [
        (m, name, getattr(m, name))
        for m in model.modules()
        for name, kind in (
            ("p", nn.modules.dropout._DropoutNd),
            ("dropout", nn.MultiheadAttention),
            # the sdpa attention classes of transformers 4
            ("dropout_prob", nn.Module),
        )
        if isinstance(m, kind) and hasattr(m, name)
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        for dropout, name, _ in dropouts:
            setattr(dropout, name, 0.0)
        try:
            yield
        finally:
            for dropout, name, rate in dropouts:
                setattr(dropout, name, rate)
            for m, mode in modes.items():
                m.training = mode
            for place, name, value, there in values:
                place.pop(name, None)
                if there:
                    place[name] = value
            for p, grad in gradients.items():
                p.grad = grad
            with torch.no_grad():
                for b, value in buffers.items():
                    b.copy_(value)


def medians(
    works: Sequence[tuple[Callable[[], object], Callable[[], object]]], rounds: int
) -> list[float]:
    """The median seconds of some works in turns, each after a preparation that is not timed.

    A round before the first warms up.
    """
    seconds: list[list[float]] = [[] for _ in works]
    order = list(enumerate(works))
    for number in range(-1, rounds):
        for i, (prepare, work) in order[:: 1 if number % 2 else -1]:
            prepare()
            taken = _timed(work)
            if number >= 0:
                seconds[i].append(taken)
    return [float(torch.tensor(s).median()) for s in seconds]


def speed(what: str, seconds: Sequence[float]) -> Row:
    """A row of two medians."""
    first, second = seconds
    return Row(
        f"{what}, median",
        f"{first * 1e3:.1f} ms",
        f"{second * 1e3:.1f} ms",
        f"{first / second:.2f} x as fast",
        None,
    )


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started
