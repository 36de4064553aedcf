"""Capturing calls as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastbert.models.config import BertConfig
from fastbert.models.inputs import Inputs
from fastbert.ops.context import autocast_dtype


def padded_inputs(
    tokens: int, sequences: int, longest: int, types: bool, device: torch.device
) -> dict[str, Any]:
    """A model's input tensors for a packed batch of these sizes: `fill` writes them and a graph reads them."""
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(tokens, dtype=torch.int64, device=device),
        "position_ids": torch.zeros(tokens, dtype=torch.int64, device=device),
        "cu_seqlens": torch.zeros(sequences + 1, dtype=torch.int32, device=device),
        "max_seqlen": longest,
    }
    if types:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def fill(inputs: dict[str, Any], batch: Inputs) -> None:
    """Copy a batch to the front of each input; an earlier batch's values after it belong to no sequence."""
    tokens = batch.ids.shape[0]
    inputs["input_ids"][:tokens] = batch.ids
    inputs["position_ids"][:tokens] = batch.positions
    if batch.types is not None:
        inputs["token_type_ids"][:tokens] = batch.types
    bounds, given = inputs["cu_seqlens"], batch.packing.cu_seqlens
    bounds[: given.shape[0]] = given
    bounds[given.shape[0] :] = given[-1]


def config_of(model: nn.Module, max_graphs: int) -> BertConfig:
    """The configuration of a fastbert model. Raises TypeError for another model, ValueError for max_graphs below 1."""
    config = getattr(model, "config", None)
    if not isinstance(config, BertConfig):
        raise TypeError(
            f"{type(model).__name__} is no model of fastbert.bert: pass one, such as BertModel"
        )
    if max_graphs < 1:
        raise ValueError(f"max_graphs is {max_graphs}: it must be at least 1")
    return config


def touch(entries: OrderedDict[tuple[Any, ...], Any], key: tuple[Any, ...], most: int) -> None:
    """Mark an entry as the last used, and drop all but the `most` last used ones."""
    entries.move_to_end(key)
    while len(entries) > most:
        entries.popitem(last=False)


class Capture:
    """Captures calls as CUDA graphs that share a memory pool and therefore a stream."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: Any = None

    def __call__(self, call: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
        """(graph, what call() returns), captured after two calls that compile kernels and set up libraries."""
        low = contextlib.nullcontext()
        if (kind := autocast_dtype(device.type)) is not None:
            # autocast's cache of cast weights would hold memory of the graph
            low = torch.autocast(device.type, kind, cache_enabled=False)  # type: ignore[assignment]
        with torch.cuda.device(device), low:
            stream = self.stream = self.stream or torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(2):
                    call()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # other threads, such as a data loader's, may use CUDA during the capture
            mode = "thread_local"
            with torch.cuda.graph(graph, self.pool, stream, capture_error_mode=mode):
                outputs = call()
            self.pool = self.pool or graph.pool()
        return graph, outputs


def multiple(count: int, step: int) -> int:
    """`count` rounded up to a multiple of `step`."""
    return -(-count // step) * step


def power(count: int, least: int) -> int:
    """`count` rounded up to a power of two, or `least`, a power of two, if that is larger."""
    return max(least, 1 << max(count - 1, 0).bit_length())
