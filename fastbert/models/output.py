"""A model's results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor
from torch.export import register_dataclass

from fastbert.files import quoted


@dataclass
class Output:
    """A model's results; fields that were not computed are None, and are left out of indices and iteration.

    Fields in PER_TOKEN are (B, S, ...) with zeros at padding, or (T, ...) if the caller passed packed tokens. Fields in
    PER_SEQUENCE are (B, ...). The losses are scalars, and attentions are always (B, H, S, S).
    """

    PER_TOKEN: ClassVar[tuple[str, ...]] = (
        *("logits", "prediction_logits", "start_logits", "end_logits"),
        *("last_hidden_state", "hidden_states"),
    )
    PER_SEQUENCE: ClassVar[tuple[str, ...]] = ("seq_relationship_logits", "pooler_output")

    loss: Tensor | None = None
    logits: Tensor | None = None
    prediction_logits: Tensor | None = None  # (B, S, V)
    seq_relationship_logits: Tensor | None = None  # (B, 2)
    start_logits: Tensor | None = None  # (B, S)
    end_logits: Tensor | None = None  # (B, S)
    last_hidden_state: Tensor | None = None  # (B, S, C)
    pooler_output: Tensor | None = None  # (B, C)
    # the embeddings, then every layer's output
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    mlm_loss: Tensor | None = None
    nsp_loss: Tensor | None = None

    def keys(self) -> list[str]:
        """The names of the fields that were computed."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """The computed fields in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{quoted(key)} was not computed: there are {', '.join(self.keys())}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())


class SequenceOutput(Output):
    """The results of a classifier of whole sequences: logits are (B, classes)."""

    PER_TOKEN = tuple(name for name in Output.PER_TOKEN if name != "logits")
    PER_SEQUENCE = ("logits", *Output.PER_SEQUENCE)


# torch.export takes and returns registered classes only, and saves them under these names
for _kind in (Output, SequenceOutput):
    register_dataclass(_kind, serialized_type_name=f"fastbert.bert.{_kind.__name__}")
