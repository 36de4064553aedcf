"""A model's inference as one CUDA graph: the host launches once, and tokens are padded to a few sizes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.models.inputs import Inputs, prepare
from fastbert.models.output import Output
from fastbert.nn.packing import Packing
from fastbert.ops.context import autocast_dtype
from fastbert.runners.capture import Capture, config_of, fill, multiple, padded_inputs, power, touch

# places of a padded batch (B * S) beyond which the host keeps up with the device without a graph
MAX_TOKENS = 65536


@dataclasses.dataclass
class _Entry:
    """The inputs that a graph reads, the outputs that it writes, and the graph; None on a CPU."""

    inputs: dict[str, Any]
    outputs: Any
    graph: Any


class InferenceRunner:
    """Calls a model of fastbert without gradients, on a GPU by replaying a CUDA graph for the batch's size.

    `InferenceRunner(model)(input_ids, attention_mask, token_type_ids)` returns what `model` returns for the same padded
    batch (B, S) in eval mode, as new tensors. So that few graphs serve all batches, packed tokens are padded to a power
    of two of at least 16, above 1024 to multiples of an eighth of it; the number of sequences and the longest length
    are padded to powers of two. The last `max_graphs` used graphs are kept. Batches of more than `max_tokens` places
    (B * S) run without a graph. A graph's outputs stay allocated beside the copies that are returned: use a smaller
    `max_tokens` for models with a decoder, whose logits are (B, S, V). Weights may be changed in place, not replaced.
    On a CPU the same padded call runs without graphs. One host sync a call, for the number of tokens. Raises TypeError
    for a model without a configuration, ValueError for a model in training mode and for arguments that the model
    refuses.
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
        return self._cut(entry.outputs, batch)

    def _sizes(self, tokens: int, packing: Packing) -> tuple[int, int, int]:
        """Tokens, sequences and longest length of the graph that serves this batch."""
        sequences = power(packing.batch, 1)
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
    def _cut(outputs: Output, batch: Inputs) -> Output:
        """Copies of the batch's part of each output: tokens as (B, S, ...), sequences without the extra ones."""
        packing, cut = batch.packing, {}
        for name in outputs.keys():  # noqa: SIM118 -- an Output iterates over values
            value = getattr(outputs, name)
            if name in outputs.PER_TOKEN:
                value = packing.pad(value[: batch.ids.shape[0]])
            elif name in outputs.PER_SEQUENCE:
                value = value[: packing.batch]
            cut[name] = value.clone()
        return type(outputs)(**cut)
