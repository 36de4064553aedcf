"""A model's inference or training step as one CUDA graph: one launch for the host, tokens padded to a few sizes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.models.inputs import Inputs, prepare
from fastbert.nn.packing import Packing
from fastbert.ops.context import autocast_dtype
from fastbert.runners.capture import Capture, config_of, fill, multiple, padded_inputs, power, touch

# padded tokens of a batch, beyond which the host keeps up with the device without a graph
MAX_TOKENS = 65536


@dataclasses.dataclass
class _Entry:
    """The inputs that a graph reads, what it writes, and the graph, None on a CPU."""

    inputs: dict[str, Any]
    outputs: Any
    graph: Any


class InferenceRunner:
    """Calls a model of fastbert without gradients, on a GPU by replaying a CUDA graph for the batch's size.

    `InferenceRunner(model)(input_ids, attention_mask, token_type_ids)` returns what `model` returns for the same padded
    batch (B, S) in eval mode, as new tensors. Tokens are packed, then padded to a power of two and at least 16, above
    1024 to an eighth of one, the number of sequences and the longest length to powers of two, so that few graphs serve
    all batches: the last `max_graphs` used are kept. Batches of more than `max_tokens` places (B * S) run without a
    graph. A graph's outputs stay allocated beside the copies that are returned: give models with a decoder, whose
    logits are (B, S, V), fewer of `max_tokens`. Weights may be changed in place, not replaced.
    On a CPU the same padded call runs without graphs. One host sync a call, for the number of tokens. Raises TypeError
    for a model without a configuration, ValueError for one in training mode and for what the model itself refuses.
    """

    def __init__(
        self, model: nn.Module, *, max_tokens: int = MAX_TOKENS, max_graphs: int = 32
    ) -> None:
        self.config = config_of(model, max_graphs)
        if max_tokens < 0:
            raise ValueError(f"max_tokens is {max_tokens}: pass 0 to run without graphs, or more")
        self.model, self.max_tokens, self.max_graphs = model, max_tokens, max_graphs
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._capture = Capture()

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,  # (B, S) int64
        attention_mask: Tensor | None = None,  # (B, S), 1 at tokens
        token_type_ids: Tensor | None = None,  # (B, S) int64
    ) -> Any:
        """The model's output for a padded batch."""
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval()")
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
        touch(self._entries, key, self.max_graphs)
        fill(entry.inputs, batch)
        if entry.graph is None:
            entry.outputs = self.model(**entry.inputs)
        else:
            with torch.cuda.device(device):
                entry.graph.replay()
        return self._cut(entry.outputs, batch, sizes)

    def _sizes(self, tokens: int, packing: Packing) -> tuple[int, int, int]:
        """Tokens, sequences and longest length of the graph that serves this batch."""
        # one sequence more, an odd number that no number of tokens equals; it is empty
        sequences = power(packing.batch, 1) + 1
        longest = min(power(packing.max_seqlen, 16), self.config.max_length)
        padded = power(tokens, 16)
        if padded > 1024:
            padded = multiple(tokens, padded // 8)
        return padded, sequences, longest

    def _prepare(self, sizes: tuple[int, int, int], types: bool, device: torch.device) -> _Entry:
        inputs = padded_inputs(*sizes, types, device)
        if device.type != "cuda":
            return _Entry(inputs, None, None)
        graph, outputs = self._capture(lambda: self.model(**inputs), device)
        return _Entry(inputs, outputs, graph)

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
