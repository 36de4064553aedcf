"""A training step's forward and backward as one CUDA graph; tokens are padded to a few sizes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert.backend.torch_private import zero_all
from fastbert.models.inputs import Inputs, prepare
from fastbert.models.output import Output
from fastbert.ops.context import autocast_dtype
from fastbert.runners.capture import Capture, config_of, fill, multiple, padded_inputs, power, touch


@dataclasses.dataclass
class _Step:
    """The inputs of a captured step, the parameters that get gradients, the losses and the graph; None on a CPU."""

    inputs: dict[str, Any]
    used: list[nn.Parameter]
    output: Output | None
    graph: Any


class TrainingRunner:
    """Forward and backward of a training step, on a GPU by replaying a CUDA graph for the batch's size.

    `TrainingRunner(model)(input_ids, attention_mask, token_type_ids, labels=...)` returns an Output with the losses
    that `model` returns in training mode, detached, and nothing else; gradients are added to the parameters' `.grad` as
    `output.loss.backward()` adds them. Clipping, optimiser and schedule stay outside. Packed tokens are padded to a
    multiple of a sixteenth of the next power of two (at least 256), labelled rows to a multiple of a 32nd of the
    tokens; sequences to a multiple of a sixteenth of the next power of two in masked-LM models, and not at all in
    others. A size is captured at its second occurrence, and the last `max_graphs` used graphs are kept. All graphs add
    to the same gradient tensors, which the runner keeps between steps. Dropout draws new masks in every replay. Works
    under bf16 autocast. Parameters may be changed in place, not replaced; a graph ignores hooks, dropout rates,
    backends and an `eval()` of a part that were set after its capture. On a CPU the same padded call runs without
    graphs. One host sync a call, for the numbers of tokens and labels; none if `cu_seqlens`, `max_seqlen` and
    `label_rows` are given. Raises TypeError for a model without a configuration (DistributedDataParallel has none), for
    a GPT and for `inputs_embeds`, ValueError for a model in eval mode, for fp16 autocast, which needs a GradScaler, and
    for arguments that the model refuses.
    """

    def __init__(self, model: nn.Module, *, max_graphs: int = 64) -> None:
        self.config = config_of(model, max_graphs)
        if getattr(model, "causal", False):
            raise TypeError(
                f"a {type(model).__name__} is scored against the next tokens, which TrainingRunner does not do: call "
                "the model itself"
            )
        self.model, self.max_graphs = model, max_graphs
        self._masked_lm = getattr(model, "reads_label_rows", False)
        self._of_tokens = getattr(model, "labels_per_token", False)
        self._parameters = list(model.parameters())
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._entries: OrderedDict[tuple[Any, ...], _Step] = OrderedDict()
        # keys that occurred before, in order of last use
        self._met: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._capture = Capture()

    @torch.enable_grad()
    def __call__(
        self,
        input_ids: Tensor,  # (B, S) int64, or packed (T,) with cu_seqlens and max_seqlen
        attention_mask: Tensor | None = None,  # (B, S), 1 at tokens
        token_type_ids: Tensor | None = None,  # as input_ids
        **options: Any,  # labels and other arguments of the model's forward
    ) -> Output:
        """The losses of a batch; adds the gradients of `loss` to the parameters' `.grad`."""
        self._check(input_ids, options)
        if input_ids.numel() == 0:
            given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self._step({"input_ids": input_ids, **given, **options})
        batch, targets = self._packed(input_ids, attention_mask, token_type_ids, options)
        sizes = self._sizes(batch)
        if (answers := targets.get("next_sentence_label")) is not None:
            more = sizes[1] - batch.packing.batch
            targets["next_sentence_label"] = tnf.pad(answers.reshape(-1), (0, more), value=-100)
        key = self._key(batch, sizes, targets)
        entry = self._entries.get(key)
        if entry is None:
            inputs = self._inputs(batch, sizes, targets)
            if key not in self._met:
                output = self._step(inputs)
                self._met[key] = None
                touch(self._met, key, 1024)
                return output
            entry = self._entries[key] = self._prepare(inputs, input_ids.device)
        touch(self._entries, key, self.max_graphs)
        self._fill(entry.inputs, batch, targets)
        if entry.graph is None:
            return self._step(entry.inputs)
        self._own(entry.used)
        with torch.cuda.device(input_ids.device):
            entry.graph.replay()
        return _losses(entry.output, Tensor.clone)

    def _check(self, ids: Tensor | None, options: dict[str, Any]) -> None:
        if ids is None or options.get("inputs_embeds") is not None:
            raise TypeError(
                "TrainingRunner takes input_ids: call the model itself with inputs_embeds"
            )
        if not self.model.training:
            raise ValueError("the model is in eval mode: call model.train()")
        if autocast_dtype(ids.device.type) == torch.float16:
            raise ValueError(
                "the model runs under fp16 autocast, which needs a GradScaler: use bfloat16"
            )

    def _key(
        self, batch: Inputs, sizes: tuple[int, ...], targets: dict[str, Any]
    ) -> tuple[Any, ...]:
        """The key of the graph: batches with equal keys can use the same graph."""
        given = [
            (name, (v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v))
            for name, v in sorted(targets.items())
        ]
        device = batch.ids.device
        absent = tuple(t is None for t in (batch.types, batch.labels, batch.label_rows))
        wanted = tuple(p.requires_grad for p in self._parameters)
        kind = autocast_dtype(device.type)
        return (sizes, *given, absent, device, kind, wanted)

    def _packed(
        self, ids: Tensor, mask: Tensor | None, types: Tensor | None, options: dict[str, Any]
    ) -> tuple[Inputs, dict[str, Any]]:
        """The packed batch with its per-token labels, and the remaining arguments of the model's forward."""
        packing = ["position_ids", "cu_seqlens", "max_seqlen", "label_rows"]
        packing += ["labels"] if self._of_tokens else []
        given = {name: options.pop(name) for name in packing if name in options}
        for name in ("num_items_in_batch", "num_pairs_in_batch"):
            # a tensor, since the graph would keep a Python number of the first batch
            if (count := options.get(name)) is not None:
                count = torch.as_tensor(count, dtype=torch.float32, device=ids.device)
                options[name] = count.reshape(())
        for name in ("start_positions", "end_positions"):
            if mask is not None and options.get(name) is not None:
                options[name] = _offsets(options[name].reshape(-1), mask != 0)
        batch = prepare(self.config, ids, mask, types, rows_wanted=self._masked_lm, **given)
        return batch, options

    def _sizes(self, batch: Inputs) -> tuple[int, int, int, int]:
        """Tokens, sequences, longest length and labelled rows of the graph that serves this batch."""
        packing, rows = batch.packing, batch.label_rows
        longest = min(power(packing.max_seqlen, 16), self.config.max_length)
        longest = max(longest, packing.max_seqlen)
        # one extra token belongs to no sequence; unused entries of label_rows point at it
        tokens = batch.ids.shape[0] + 1
        tokens = multiple(tokens, max(256, power(tokens, 1) // 16))
        labelled = 0 if rows is None else multiple(max(rows.shape[0], 1), tokens // 32)
        sequences = packing.batch
        if self._masked_lm:
            # the extra sequences have no tokens, and the next-sentence label -100
            sequences = multiple(sequences, max(1, power(sequences, 1) // 16))
        return tokens, sequences, longest, labelled

    def _inputs(
        self, batch: Inputs, sizes: tuple[int, int, int, int], targets: dict[str, Any]
    ) -> dict[str, Any]:
        """New input tensors of these sizes, filled with the batch."""
        tokens, sequences, longest, labelled = sizes
        types, device = batch.types is not None, batch.ids.device
        inputs = padded_inputs(tokens, sequences, longest, types, device)
        for name, value in targets.items():
            inputs[name] = value.clone() if isinstance(value, Tensor) else value
        if batch.labels is not None:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        if batch.label_rows is not None:
            inputs["label_rows"] = inputs["input_ids"].new_zeros(labelled)
        self._fill(inputs, batch, targets)
        return inputs

    def _prepare(self, inputs: dict[str, Any], device: torch.device) -> _Step:
        """Capture the step; gradients and the random state are restored afterwards."""
        if device.type != "cuda":
            return _Step(inputs, [], None, None)
        state = torch.cuda.get_rng_state(device)
        before = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        try:
            for p in self._parameters:
                p.grad = None
            # run once to see which parameters get a gradient; the others keep None, as without a graph
            self._step(inputs)
            used = [p for p in self._parameters if p.grad is not None]
            for p in used:
                p.grad = self._gradients.setdefault(p, p.grad)  # type: ignore[arg-type]
            graph, output = self._capture(lambda: self._step(inputs), device)
        finally:
            for p, gradient in zip(self._parameters, before, strict=True):
                p.grad = gradient
            torch.cuda.set_rng_state(state, device)
        return _Step(inputs, used, output, graph)

    def _step(self, inputs: dict[str, Any]) -> Output:
        output = self.model(**inputs)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                "the model returned no loss: pass what its forward needs for one, such as labels"
            )
        loss.backward()
        return _losses(output, Tensor.detach)

    def _own(self, used: list[nn.Parameter]) -> None:
        """Copy gradients into the tensors that the graphs add to, and make these the parameters' `.grad`."""
        none = []
        for p in used:
            ours = self._gradients[p]
            if p.grad is None:
                none.append(ours)
            elif p.grad is not ours:
                ours.copy_(p.grad)
            p.grad = ours
        if none:
            zero_all(none)

    @staticmethod
    def _fill(inputs: dict[str, Any], batch: Inputs, targets: dict[str, Any]) -> None:
        """Copy a batch and the other arguments into a graph's inputs."""
        fill(inputs, batch)
        if batch.labels is not None:
            inputs["labels"][: batch.labels.shape[0]] = batch.labels
        if (rows := batch.label_rows) is not None:
            inputs["label_rows"][: rows.shape[0]] = rows
            inputs["label_rows"][rows.shape[0] :] = inputs["input_ids"].shape[0] - 1
        for name, value in targets.items():
            if isinstance(value, Tensor):
                inputs[name].copy_(value)


def _losses(output: Any, copy: Callable[[Tensor], Tensor]) -> Output:
    """An Output with copies of the scalars of another one."""
    found: dict[str, Any] = {}
    for name in output.keys():  # noqa: SIM118 -- an Output iterates over values
        value = getattr(output, name)
        if isinstance(value, Tensor) and value.dim() == 0:
            found[name] = copy(value)
    return Output(**found)


def _offsets(
    columns: Tensor,  # (B,) int64
    token: Tensor,  # (B, S) bool
) -> Tensor:
    """Columns of a padded batch as offsets among each sequence's tokens; -1 for a column without a token."""
    column = columns.clamp(0, token.shape[1] - 1)[:, None]
    offset = token.cumsum(1).gather(1, column)[:, 0] - 1
    inside = (columns == column[:, 0]) & token.gather(1, column)[:, 0]
    return torch.where(inside, offset, -1)
