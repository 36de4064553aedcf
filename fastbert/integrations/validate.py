"""validate(): the accelerated model against the original, on the user's own model and batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.integrations.accelerate import accelerate, is_accelerated, restore
from fastbert.integrations.memory import saved_bytes

NAMES = ("stock", "fastbert")
COSINE = 0.9999


@dataclass(frozen=True)
class Row:
    """One comparison; `agrees` is None for speed and memory, which need not agree."""

    what: str
    stock: str
    fastbert: str
    difference: str
    agrees: bool | None


@dataclass
class Report:
    """The comparisons that validate() made; prints as a table."""

    rows: list[Row] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether all outputs, the loss and the gradients agree."""
        return all(row.agrees is not False for row in self.rows)

    def __str__(self) -> str:
        cells = [("", *NAMES, "difference", "")]
        words = {True: "agrees", False: "DIFFERS", None: ""}
        cells += [(r.what, r.stock, r.fastbert, r.difference, words[r.agrees]) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in cells)
        return "\n".join(line.rstrip() for line in lines)


def validate(
    model: nn.Module, batch: Mapping[str, Any] | Sequence[Any] | Tensor, rounds: int = 5
) -> Report:
    """Run the model as it was and accelerated on one batch, print the table of differences and return it.

    `batch` holds the forward's arguments by name, in order, or is the only one. Compared without dropout: the outputs
    in inference (cosine at least .9999; only at tokens if there is an attention mask), and in training the loss and the
    gradients (of the outputs' mean square if the model returns no loss). Speed is the median of `rounds` interleaved
    calls; memory is the bytes that training saves for backward. Afterwards weights, gradients, buffers, modes and
    random states are as before, and the model is accelerated only if it was before. Raises TypeError for a batch of
    another kind, ValueError for rounds below 1 and for a model without a layer that accelerate() knows.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    was = is_accelerated(model)
    call = _caller(model, batch)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    report = Report()
    with _kept(model):
        _switch(model, "fastbert")
        if not is_accelerated(model):
            raise ValueError(
                f"{type(model).__name__} holds no layer that accelerate() knows: there is nothing to compare"
            )
        try:
            found = {name: _run(model, call, mask, name) for name in NAMES}
            report.rows += _outputs(*(found[name] for name in NAMES))
            report.rows += _training(*(found[name] for name in NAMES))
            report.rows += _speed(model, call, mask, rounds)
        finally:
            _switch(model, "fastbert" if was else "stock")
    print(report)
    return report


# --- running ---


@dataclass
class _Found:
    outputs: dict[str, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]
    saved: int


def _caller(model: nn.Module, batch: Any) -> Callable[[], Any]:
    if isinstance(batch, Mapping):
        return lambda: model(**batch)
    if isinstance(batch, Tensor):
        return lambda: model(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return lambda: model(*batch)
    raise TypeError(
        f"batch is a {type(batch).__name__}: pass the forward's arguments as a dict, a tuple or a tensor"
    )


def _switch(model: nn.Module, name: str) -> None:
    (accelerate if name == "fastbert" else restore)(model)


def _run(model: nn.Module, call: Callable[[], Any], mask: Tensor | None, name: str) -> _Found:
    _switch(model, name)
    model.eval()
    with torch.no_grad():
        outputs = {k: _at_tokens(t, mask) for k, t in _named(call())}
    model.train()
    saved = saved_bytes(lambda: _objective(call(), mask), model.parameters())
    model.zero_grad(set_to_none=True)
    loss = _objective(call(), mask)
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return _Found(outputs, loss.detach(), gradients, saved)


def _named(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor of an output, with its name."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _named(value, str(key))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for i, value in enumerate(output):
            yield from _named(value, f"{name}[{i}]")


def _at_tokens(t: Tensor, mask: Tensor | None) -> Tensor:
    """A tensor's values at tokens: (B, S, ...) -> (T, ...); other shapes pass unchanged."""
    if mask is None or mask.dim() != 2 or t.shape[:2] != mask.shape:
        return t
    return t[mask.to(t.device) != 0]


def _objective(output: Any, mask: Tensor | None) -> Tensor:
    """The loss, or without one the sum of the outputs' mean squares."""
    named = dict(_named(output))
    if "loss" in named:
        return named["loss"]
    return torch.stack([_at_tokens(t, mask).float().square().mean() for t in named.values()]).sum()


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside; afterwards restore all that a training step changes, except weights."""
    modes = {m: m.training for m in model.modules()}
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
            for p, grad in gradients.items():
                p.grad = grad
            with torch.no_grad():
                for b, value in buffers.items():
                    b.copy_(value)


# --- comparing ---


def _cosine(x: Tensor, y: Tensor) -> float:
    x, y = x.double().flatten(), y.double().flatten()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else float(torch.equal(x, y))


def _pair(stock: str, ours: str) -> tuple[str, str]:
    return stock, ours


def _outputs(stock: _Found, ours: _Found) -> Iterator[Row]:
    for name, x in stock.outputs.items():
        y = ours.outputs.get(name)
        if y is None or y.shape != x.shape:
            yield Row(name, str(tuple(x.shape)), "missing", "", False)
        elif x.dim() and x.numel():
            cosine, largest = _cosine(x, y), float((x.double() - y.double()).abs().max())
            figures = _pair(*(f"max {float(t.abs().max()):.3g}" for t in (x, y)))
            difference = f"max {largest:.1e}, cosine {cosine:.6f}"
            yield Row(name, *figures, difference, cosine >= COSINE)


def _training(stock: _Found, ours: _Found) -> Iterator[Row]:
    x, y = float(stock.loss), float(ours.loss)
    close = abs(x - y) <= 4 * torch.finfo(stock.loss.dtype).eps * max(abs(x), 1.0) + 1e-4 * abs(x)
    yield Row("loss", f"{x:.6f}", f"{y:.6f}", f"{abs(x - y):.1e}", close or (x != x and y != y))
    one_sided = sorted(stock.gradients.keys() ^ ours.gradients.keys())
    figures = _pair(*(f"{len(f.gradients)} tensors" for f in (stock, ours)))
    if one_sided or not stock.gradients:
        yield Row(
            "gradients", *figures, f"on one side only: {', '.join(one_sided[:3])}", not one_sided
        )
        return
    flat = [torch.cat([f.gradients[k].flatten() for k in stock.gradients]) for f in (stock, ours)]
    cosine, largest = _cosine(*flat), float((flat[0].double() - flat[1].double()).abs().max())
    yield Row("gradients", *figures, f"max {largest:.1e}, cosine {cosine:.6f}", cosine >= COSINE)
    megabytes = _pair(*(f"{f.saved / 1e6:.2f} MB" for f in (stock, ours)))
    yield Row("kept for backward", *megabytes, f"{ours.saved / max(stock.saved, 1):.2f} x", None)


def _speed(
    model: nn.Module, call: Callable[[], Any], mask: Tensor | None, rounds: int
) -> Iterator[Row]:
    def inference() -> None:
        with torch.no_grad():
            call()

    def step() -> None:
        _objective(call(), mask).backward()

    for what, work, training in (("inference", inference, False), ("training", step, True)):
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        for number in range(-1, rounds):  # round -1 is a warm-up
            for name in NAMES[:: 1 if number % 2 else -1]:
                _switch(model, name)
                model.train(training)
                taken = _timed(work)
                if number >= 0:
                    seconds[name].append(taken)
        stock, ours = (float(torch.tensor(seconds[name]).median()) for name in NAMES)
        figures = _pair(f"{stock * 1e3:.1f} ms", f"{ours * 1e3:.1f} ms")
        yield Row(f"{what}, median", *figures, f"{stock / ours:.2f} x as fast", None)


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started
