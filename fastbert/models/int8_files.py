"""Int8 modules in a model.safetensors, and in state dicts.

A module's weight, scale and sources are int8_weight, int8_scale and int8_sources there, in the place of the weight that
transformers reads. Queries, keys and values are three parts, as in every checkpoint, and each has all sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.nn.int8 import Int8Embedding, Int8Linear
from fastbert.nn.int8_checks import why_not_part, why_not_state

# the first letters of an entry's name
_PREFIX = "int8_"
_SOURCES = f".{_PREFIX}sources"


def int8_modules(model: nn.Module) -> dict[str, Int8Linear | Int8Embedding]:
    """A model's int8 modules by their paths."""
    return {
        path: m for path, m in model.named_modules() if isinstance(m, (Int8Linear, Int8Embedding))
    }


def int8_keys(keys: Sequence[str]) -> list[str]:
    """The file's names of an int8 module's tensor, made from the names that a floating-point module's would have."""
    split = [key.rpartition(".") for key in keys]
    return [f"{path}.{_PREFIX}{leaf}" for path, _, leaf in split]


def is_int8(keys: Sequence[str]) -> bool:
    """Whether these are the names in a file of an int8 module's tensor."""
    return keys[0].rpartition(".")[2].startswith(_PREFIX)


def parts_of(value: Tensor, keys: Sequence[str]) -> Sequence[Tensor]:
    """A tensor's parts under these names: pieces of its rows; each part has all sources."""
    if keys[0].endswith(_SOURCES):
        return [value.clone() for _ in keys]
    return value.chunk(len(keys))


def hold(
    modules: Mapping[str, Int8Linear | Int8Embedding],
    wanted: Mapping[str, Sequence[str]],
    state: Mapping[str, Tensor],
    source: str,
) -> None:
    """Give every module its tensors, all or none; `wanted` has the names in the file `source` of each key of the model.

    Raises ValueError that names the first tensor that does not fit.
    """
    found: list[tuple[Int8Linear | Int8Embedding, dict[str, Tensor]]] = []
    for path, m in modules.items():
        tensors: dict[str, Tensor] = {}
        for leaf in m.leaves:
            if (names := wanted.get(f"{path}.{leaf}")) is None:
                continue
            extra = tensors["sources"].numel() if "sources" in tensors else 0
            for name in names:
                if reason := why_not_part(m, leaf, state[name], len(names), extra):
                    raise ValueError(
                        f"{name} in {source} {reason}: run fastbert quantize again, or copy the folder again"
                    )
            parts = [state[name] for name in names]
            if leaf == "sources" and not all(torch.equal(p, parts[0]) for p in parts):
                raise ValueError(f"{', '.join(names)} in {source} differ: copy the folder again")
            single = len(parts) == 1 or leaf == "sources"
            tensors[leaf] = parts[0] if single else torch.cat(parts)
        found.append((m, tensors))
    for m, tensors in found:
        m.hold(**tensors)


def check_state(model: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Refuse a state dict with integers for floating-point weights, or the other way round, before any of it is loaded.

    Raises RuntimeError, as load_state_dict does, with one sentence.
    """
    for path, m in int8_modules(model).items():
        if reason := why_not_state(m, state, f"{prefix}{path}."):
            raise RuntimeError(reason)
    for name, p in model.named_parameters(remove_duplicate=False):
        t = state.get(prefix + name)
        if isinstance(t, Tensor) and t.dtype == torch.int8:
            raise RuntimeError(
                f"{prefix}{name} is int8 in the state dict and {p.dtype} in the model: call "
                "fastbert.quantize(model, replace=True) first, or load the folder with from_pretrained"
            )
