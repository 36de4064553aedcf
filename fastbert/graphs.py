"""A model's inference or training step as one CUDA graph: one launch for the host, tokens padded to a few sizes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.config import BertConfig
from fastbert.ops._register import autocast_dtype
from fastbert.packing import Inputs, Packing, prepare

# tokens beyond which a launch no longer costs what the work does
MAX_TOKENS = 4096


@dataclasses.dataclass
class _Entry:
    """The inputs that a graph reads, what it writes, and the graph, None on a CPU."""

    inputs: dict[str, Any]
    outputs: Any
    graph: Any


class InferenceRunner:
    """Calls a model of fastbert without gradients, on a GPU by replaying a CUDA graph for the batch's size.

    `InferenceRunner(model)(input_ids, attention_mask, token_type_ids)` returns what `model` returns for the same padded
    batch (B, S) in eval mode, as new tensors. Tokens are packed, then padded to a power of two and at least 16, the
    number of sequences and the longest length likewise, so that few graphs serve all batches: the last `max_graphs`
    used are kept. Batches above `max_tokens` tokens run without a graph. Weights may be changed in place, not replaced.
    On a CPU the same padded call runs without graphs. One host sync a call, for the number of tokens. Raises TypeError
    for a model without a configuration, ValueError for what the model itself refuses.
    """

    def __init__(
        self, model: nn.Module, *, max_tokens: int = MAX_TOKENS, max_graphs: int = 32
    ) -> None:
        self.config = _config(model, max_graphs)
        self.model, self.max_tokens, self.max_graphs = model, max_tokens, max_graphs
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._pool: Any = None

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,  # (B, S) int64
        attention_mask: Tensor | None = None,  # (B, S), 1 at tokens
        token_type_ids: Tensor | None = None,  # (B, S) int64
    ) -> Any:
        """The model's output for a padded batch."""
        if self.model.training:
            self.model.eval()
        given = (input_ids, attention_mask, token_type_ids)
        if input_ids.dim() != 2 or input_ids.numel() > self.max_tokens or input_ids.numel() == 0:
            return self.model(*given)
        batch = prepare(self.config, *given)
        sizes = self._sizes(batch.ids.shape[0], batch.packing)
        device, types = input_ids.device, batch.types is not None
        key = (*sizes, types, device, autocast_dtype(device.type))
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = self._prepare(sizes, types, device)
        _touch(self._entries, key, self.max_graphs)
        self._fill(entry.inputs, batch)
        if entry.graph is None:
            entry.outputs = self.model(**entry.inputs)
        else:
            entry.graph.replay()
        return self._cut(entry.outputs, batch, sizes)

    def _sizes(self, tokens: int, packing: Packing) -> tuple[int, int, int]:
        """Tokens, sequences and longest length of the graph that serves this batch."""
        # one sequence more, an odd number that no number of tokens equals; it is empty
        sequences = _power(packing.batch, 1) + 1
        longest = min(_power(packing.max_seqlen, 16), self.config.max_length)
        return _power(tokens, 16), sequences, longest

    def _prepare(self, sizes: tuple[int, int, int], types: bool, device: torch.device) -> _Entry:
        tokens, sequences, longest = sizes
        inputs: dict[str, Any] = {
            "input_ids": torch.zeros(tokens, dtype=torch.int64, device=device),
            "position_ids": torch.zeros(tokens, dtype=torch.int64, device=device),
            "cu_seqlens": torch.zeros(sequences + 1, dtype=torch.int32, device=device),
            "max_seqlen": longest,
        }
        if types:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        if device.type != "cuda":
            return _Entry(inputs, None, None)
        graph, outputs = _captured(lambda: self.model(**inputs), device, self._pool)
        self._pool = self._pool or graph.pool()
        return _Entry(inputs, outputs, graph)

    @staticmethod
    def _fill(inputs: dict[str, Any], batch: Inputs) -> None:
        """Copy a batch in front of each input; what an earlier one left behind it belongs to no sequence."""
        tokens = batch.ids.shape[0]
        inputs["input_ids"][:tokens] = batch.ids
        inputs["position_ids"][:tokens] = batch.positions
        if batch.types is not None:
            inputs["token_type_ids"][:tokens] = batch.types
        bounds, given = inputs["cu_seqlens"], batch.packing.cu_seqlens
        bounds[: given.shape[0]] = given
        bounds[given.shape[0] :] = given[-1]

    @staticmethod
    def _cut(outputs: Any, batch: Inputs, sizes: tuple[int, int, int]) -> Any:
        """The part of each output that is the batch's: tokens back in (B, S), sequences without the extra ones."""
        packing, cut = batch.packing, {}
        for field in dataclasses.fields(outputs):
            value = getattr(outputs, field.name)
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == sizes[0]:
                value = packing.pad(value[: batch.ids.shape[0]])
            elif isinstance(value, Tensor) and value.dim() and value.shape[0] == sizes[1]:
                value = value[: packing.batch]
            cut[field.name] = value.clone() if isinstance(value, Tensor) else value
        return type(outputs)(**cut)


@dataclasses.dataclass
class _Step:
    """The inputs of a captured training step, the parameters that it gives gradients, its loss and its graph."""

    inputs: dict[str, Any]
    used: list[nn.Parameter]
    loss: Tensor | None
    graph: Any


class TrainingRunner:
    """Forward and backward of a training step, on a GPU by replaying a CUDA graph for the batch's size.

    `TrainingRunner(model)(input_ids, attention_mask, token_type_ids, labels=...)` takes what `model` takes in training
    mode and returns its loss, fp32 and detached; gradients are added to the parameters' `.grad` as `loss.backward()`
    adds them. Optimiser, clipping and schedule stay outside. Tokens are packed, then padded to sizes at most a
    sixteenth apart, so that few graphs serve all batches: the last `max_graphs` used are kept. All graphs add to the
    same gradients, which stay the runner's between steps. Dropout draws new masks in every replay. Works under bf16
    autocast; parameters may be changed in place, not replaced. On a CPU the same padded call runs without graphs. One
    host sync a call, for the numbers of tokens and labels, none where `cu_seqlens`, `max_seqlen` and `label_rows` are
    given. Raises TypeError for a model without a configuration (DistributedDataParallel has none), ValueError for a
    model in eval mode, for fp16 autocast, which wants a GradScaler, and for what the model itself refuses.
    """

    def __init__(self, model: nn.Module, *, max_graphs: int = 32) -> None:
        self.config = _config(model, max_graphs)
        self.model, self.max_graphs = model, max_graphs
        self._parameters = list(model.parameters())
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._entries: OrderedDict[tuple[Any, ...], _Step] = OrderedDict()
        self._pool: Any = None

    @torch.enable_grad()
    def __call__(
        self,
        input_ids: Tensor,  # (B, S) int64, or packed (T,) with cu_seqlens and max_seqlen
        attention_mask: Tensor | None = None,  # (B, S), 1 at tokens
        token_type_ids: Tensor | None = None,  # as input_ids
        **options: Any,  # labels and whatever else the model's forward takes
    ) -> Tensor:
        """The loss of a batch, whose gradients are added to the parameters'."""
        kind = autocast_dtype(input_ids.device.type)
        if not self.model.training or kind == torch.float16:
            problem = "is in eval mode: call model.train()"
            if self.model.training:
                problem = "runs under fp16 autocast, which wants a GradScaler: use bfloat16"
            raise ValueError(f"the model {problem}")
        batch, targets = self._packed(input_ids, attention_mask, token_type_ids, options)
        sizes = self._sizes(batch)
        shapes = [
            (name, v.shape if isinstance(v, Tensor) else v) for name, v in sorted(targets.items())
        ]
        wanted = tuple(p.requires_grad for p in self._parameters)
        key = (sizes, *shapes, batch.types is not None, input_ids.device, kind, wanted)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = self._prepare(batch, sizes, targets)
        _touch(self._entries, key, self.max_graphs)
        self._fill(entry.inputs, batch, targets)
        if entry.graph is None:
            return self._step(entry.inputs)
        self._own(entry.used)
        entry.graph.replay()
        return entry.loss.clone()  # type: ignore[union-attr]

    def _packed(
        self, ids: Tensor, mask: Tensor | None, types: Tensor | None, options: dict[str, Any]
    ) -> tuple[Inputs, dict[str, Any]]:
        """The batch packed, with labels of tokens, and what else the model's forward is called with."""
        packing = ("position_ids", "cu_seqlens", "max_seqlen", "label_rows")
        given = {name: options.pop(name) for name in packing if name in options}
        labels, items = options.get("labels"), options.get("num_items_in_batch")
        if isinstance(items, int):
            # a number that changes from batch to batch is no part of the graph
            options["num_items_in_batch"] = torch.full((), items, device=ids.device)
        if labels is not None and labels.shape == ids.shape:
            given["labels"] = options.pop("labels")
        rows = hasattr(self.model, "mlm_head")
        return prepare(self.config, ids, mask, types, rows_wanted=rows, **given), options

    def _sizes(self, batch: Inputs) -> tuple[int, int, int, int]:
        """Tokens, sequences, longest length and labelled rows of the graph that serves this batch."""
        packing, rows = batch.packing, batch.label_rows
        longest = min(_power(packing.max_seqlen, 16), self.config.max_length)
        # one token more, which is nobody's: labelled rows that there are not point to it
        tokens = _sixteenth(batch.ids.shape[0] + 1)
        return tokens, packing.batch, longest, 0 if rows is None else _sixteenth(rows.shape[0])

    def _prepare(
        self, batch: Inputs, sizes: tuple[int, int, int, int], targets: dict[str, Any]
    ) -> _Step:
        tokens, sequences, longest, labelled = sizes
        device = batch.ids.device

        def integers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int64, device=device)

        inputs: dict[str, Any] = {
            "input_ids": integers(tokens),
            "position_ids": integers(tokens),
            "cu_seqlens": integers(sequences + 1).int(),
            "max_seqlen": longest,
            **{n: v.clone() if isinstance(v, Tensor) else v for n, v in targets.items()},
        }
        if batch.types is not None:
            inputs["token_type_ids"] = integers(tokens)
        if batch.labels is not None:
            inputs["labels"] = integers(tokens)
        if batch.label_rows is not None:
            inputs["label_rows"] = integers(labelled)
        if device.type != "cuda":
            return _Step(inputs, [], None, None)
        self._fill(inputs, batch, targets)
        state = torch.cuda.get_rng_state(device)
        before = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        # a first step shows which parameters get a gradient at all; the others' stays None, as without a graph
        self._step(inputs)
        used = [p for p in self._parameters if p.grad is not None]
        for p in used:
            p.grad = self._gradients.setdefault(p, p.grad)  # type: ignore[arg-type]
        graph, loss = _captured(lambda: self._step(inputs), device, self._pool)
        self._pool = self._pool or graph.pool()
        for p, gradient in zip(self._parameters, before, strict=True):
            p.grad = gradient
        torch.cuda.set_rng_state(state, device)
        return _Step(inputs, used, loss, graph)

    def _step(self, inputs: dict[str, Any]) -> Tensor:
        loss = self.model(**inputs).loss
        if loss is None:
            raise ValueError("the model returned no loss: pass labels")
        loss.backward()
        return loss.detach()

    def _own(self, used: list[nn.Parameter]) -> None:
        """Have the parameters' gradients be the tensors that the graphs add to, with what they hold now."""
        none = []
        for p in used:
            ours = self._gradients[p]
            if p.grad is None:
                none.append(ours)
            elif p.grad is not ours:
                ours.copy_(p.grad)
            p.grad = ours
        if none:
            torch._foreach_zero_(none)

    @staticmethod
    def _fill(inputs: dict[str, Any], batch: Inputs, targets: dict[str, Any]) -> None:
        """Copy a batch into its graph's inputs; tokens behind it belong to no sequence."""
        tokens, rows = batch.ids.shape[0], batch.label_rows
        inputs["input_ids"][:tokens] = batch.ids
        inputs["position_ids"][:tokens] = batch.positions
        inputs["cu_seqlens"].copy_(batch.packing.cu_seqlens)
        if batch.types is not None:
            inputs["token_type_ids"][:tokens] = batch.types
        if batch.labels is not None:
            inputs["labels"][:tokens] = batch.labels
        if rows is not None:
            inputs["label_rows"][: rows.shape[0]] = rows
            inputs["label_rows"][rows.shape[0] :] = inputs["input_ids"].shape[0] - 1
        for name, value in targets.items():
            if isinstance(value, Tensor):
                inputs[name].copy_(value)


def _config(model: nn.Module, max_graphs: int) -> BertConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, BertConfig):
        raise TypeError(
            f"{type(model).__name__} is no model of fastbert.bert: pass one, such as BertModel"
        )
    if max_graphs < 1:
        raise ValueError(f"max_graphs is {max_graphs}: it must be at least 1")
    return config


def _touch(entries: OrderedDict[tuple[Any, ...], Any], key: tuple[Any, ...], most: int) -> None:
    """Count an entry as the last used, and forget what was used longest ago."""
    entries.move_to_end(key)
    while len(entries) > most:
        entries.popitem(last=False)


def _captured(call: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Any]:
    """(graph, what call() returns), captured after two calls aside that compile kernels and set up libraries."""
    low = contextlib.nullcontext()
    if (kind := autocast_dtype(device.type)) is not None:
        # copies of weights that autocast keeps would be the graph's memory
        low = torch.autocast(device.type, kind, cache_enabled=False)  # type: ignore[assignment]
    side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream(device))
    with low:
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(graph, pool=pool):
            outputs = call()
    return graph, outputs


def _sixteenth(count: int) -> int:
    """The next multiple of a sixteenth of the power of two above, at least 16."""
    step = max(16, _power(count, 1) // 16)
    return max(16, -(-count // step) * step)


def _power(count: int, least: int) -> int:
    """The smallest power of two that is at least both."""
    return max(least, 1 << max(count - 1, 0).bit_length())
