"""validate(): forms of a model against each other, on the user's own model and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.integrations.accelerate import (
    AT_PADDING_ATTRIBUTE,
    accelerate,
    is_accelerated,
    restore,
)
from fastbert.integrations.memory import saved_bytes
from fastbert.integrations.quantised import compare_quantised
from fastbert.integrations.report import (
    NAMES,
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
from fastbert.runners.replace import is_replaced

COSINE = 0.9999


def validate(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Any] | Tensor | Iterable[Any],
    rounds: int = 5,
    bits: int | None = None,
) -> Report:
    """Compare two forms of a model on batches of yours, print the table of differences and return it.

    Without `bits`: the model as it was and accelerated, on one batch. `batch` holds the forward's arguments by name, in
    order, or is the only one. Compared without dropout: the outputs in inference (cosine at least .9999; only at tokens
    if there is an attention mask), and in training the loss and the gradients (of the outputs' mean square if the model
    returns no loss). Speed is the median of `rounds` interleaved calls; memory is the bytes that training saves for
    backward.

    With `bits`, 12 or 8: the model as it is and after quantize(model, bits), in inference on the CPU, on one batch or
    an iterable of batches, such as a DataLoader. Takes fastbert.bert's models and those that accelerate() knows.
    Compared over all batches: each output row by row (a row is a token's vector, or a text's; mean cosine at least
    .999); for logits the decisions, which are the classes with the largest logit (at least 99 % the same), count
    instead. Where the batches have labels: the accuracy of both and its difference in points. Memory is that of the
    encoder's weights and of their int8 copies; speed is the median of `rounds` interleaved calls on the first batch.

    Afterwards weights, gradients, buffers, modes, random states and copies of `freeze` or `quantize` are as before, and
    the model is accelerated only if it was before. Raises TypeError for a batch of another kind, ValueError for rounds
    below 1, other bits, no batches, a batch without a token, and a model without a layer that could be compared.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    was = is_accelerated(model)
    name = type(model).__name__
    if is_replaced(model):
        raise ValueError(
            f"the weights of this {name} are int8: load the model that they were made from"
        )
    if any(t.is_meta for t in model.parameters()):
        raise ValueError(
            f"the {name} is on meta: move it to the CPU by loading its weights, the meta device holds no numbers"
        )
    if bits is not None:
        report = compare_quantised(model, batch, rounds, bits)
    else:
        report = _compare_accelerated(model, batch, rounds, was)
    print(report)
    return report


def _compare_accelerated(model: nn.Module, batch: Any, rounds: int, was: bool) -> Report:
    if isinstance(batch, Sequence) and any(isinstance(b, Mapping) for b in batch):
        raise TypeError("batch is a list of batches: pass one of them, or bits=12 for all")
    check_tokens(batch, "the batch")
    report = Report()
    with kept(model):
        switch = _switcher(model)
        switch("fastbert")
        if not is_accelerated(model):
            raise ValueError(
                f"{type(model).__name__} holds no layer that accelerate() knows: there is nothing to compare"
            )
        try:
            found = {name: _run(model, batch, switch, name) for name in NAMES}
            report.rows += _outputs(*(found[name] for name in NAMES))
            report.rows += _training(*(found[name] for name in NAMES))
            report.rows += _speed(model, batch, switch, rounds)
        finally:
            switch("fastbert" if was else "stock")
    return report


# --- running ---


@dataclass
class _Found:
    outputs: dict[str, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]
    saved: int


def _switcher(model: nn.Module) -> Callable[[str], None]:
    """A function that gives the model the form of this name, accelerated with the `at_padding` that it has now."""
    chosen = [
        (m, vars(m)[AT_PADDING_ATTRIBUTE])
        for m in model.modules()
        if AT_PADDING_ATTRIBUTE in vars(m)
    ]

    def switch(name: str) -> None:
        if name == "stock":
            restore(model)
            return
        accelerate(model)
        for m, value in chosen:
            setattr(m, AT_PADDING_ATTRIBUTE, value)

    return switch


def _run(model: nn.Module, batch: Any, switch: Callable[[str], None], name: str) -> _Found:
    switch(name)
    masks = masks_of(model, batch)
    model.eval()
    with torch.no_grad():
        outputs = {k: at_tokens(k, t, masks) for k, t in named(run(model, batch))}
    model.train()
    saved = saved_bytes(lambda: _objective(run(model, batch), masks), model.parameters())
    model.zero_grad(set_to_none=True)
    loss = _objective(run(model, batch), masks)
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return _Found(outputs, loss.detach(), gradients, saved)


def _objective(output: Any, masks: Sequence[Tensor]) -> Tensor:
    """The loss, or without one the sum of the outputs' mean squares."""
    found = dict(named(output))
    if "loss" in found:
        return found["loss"]
    squares = [at_tokens(k, t, masks).float().square().mean() for k, t in found.items()]
    return torch.stack(squares).sum()


# --- comparing ---


def _cosine(x: Tensor, y: Tensor) -> float:
    x, y = x.double().flatten(), y.double().flatten()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else float(torch.equal(x, y))


def _outputs(stock: _Found, ours: _Found) -> Iterator[Row]:
    for name, x in stock.outputs.items():
        y = ours.outputs.get(name)
        if y is None or y.shape != x.shape:
            yield Row(name, str(tuple(x.shape)), "missing", "", False)
        elif x.dim() and x.numel():
            cosine, largest = _cosine(x, y), float((x.double() - y.double()).abs().max())
            figures = pair(*(f"max {float(t.abs().max()):.3g}" for t in (x, y)))
            difference = f"max {largest:.1e}, cosine {cosine:.6f}"
            yield Row(name, *figures, difference, cosine >= COSINE)


def _training(stock: _Found, ours: _Found) -> Iterator[Row]:
    x, y = float(stock.loss), float(ours.loss)
    close = abs(x - y) <= 4 * torch.finfo(stock.loss.dtype).eps * max(abs(x), 1.0) + 1e-4 * abs(x)
    yield Row("loss", f"{x:.6f}", f"{y:.6f}", f"{abs(x - y):.1e}", close or (x != x and y != y))
    one_sided = sorted(stock.gradients.keys() ^ ours.gradients.keys())
    figures = pair(*(f"{len(f.gradients)} tensors" for f in (stock, ours)))
    if one_sided or not stock.gradients:
        difference = f"on one side only: {', '.join(one_sided[:3])}"
        yield Row("gradients", *figures, difference, not one_sided)
        return
    flat = [torch.cat([f.gradients[k].flatten() for k in stock.gradients]) for f in (stock, ours)]
    cosine, largest = _cosine(*flat), float((flat[0].double() - flat[1].double()).abs().max())
    yield Row("gradients", *figures, f"max {largest:.1e}, cosine {cosine:.6f}", cosine >= COSINE)
    megabytes = pair(*(f"{f.saved / 1e6:.2f} MB" for f in (stock, ours)))
    yield Row("kept for backward", *megabytes, f"{ours.saved / max(stock.saved, 1):.2f} x", None)


def _speed(
    model: nn.Module, batch: Any, switch: Callable[[str], None], rounds: int
) -> Iterator[Row]:
    masks = masks_of(model, batch)

    def inference() -> None:
        with torch.no_grad():
            run(model, batch)

    def step() -> None:
        _objective(run(model, batch), masks).backward()

    def prepare(name: str, training: bool) -> None:
        switch(name)
        model.train(training)

    for what, work, training in (("inference", inference, False), ("training", step, True)):
        works = [(partial(prepare, name, training), work) for name in NAMES]
        yield speed(what, medians(works, rounds))
