"""Int8 modules in a model.safetensors.

A module's weight, scale and sources are int8_weight, int8_scale and int8_sources there, in the place of the weight that
transformers reads. Queries, keys and values are three parts, as in every checkpoint, and each has all sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastbert.nn.int8 import Int8Embedding, Int8Linear, why_not_integers, why_not_sources

# the first letters of an entry's name, and the dtypes of the three
_PREFIX = "int8_"
_DTYPES = {"weight": torch.int8, "scale": torch.float32, "sources": torch.int32}
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
        for leaf in ("sources", "weight", "scale"):
            if (names := wanted.get(f"{path}.{leaf}")) is None:
                continue
            extra = tensors["sources"].numel() if "sources" in tensors else 0
            for name in names:
                if reason := _why_not(m, leaf, state[name], len(names), extra):
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


def _why_not(
    m: Int8Linear | Int8Embedding, leaf: str, t: Tensor, count: int, extra: int
) -> str | None:
    """Why a tensor can't be one of `count` parts, as the end of a sentence; the weight has `extra` more columns."""
    N, K = m.shape
    if t.dtype != _DTYPES[leaf]:
        return f"is {t.dtype} and not {_DTYPES[leaf]}"
    shapes = {"weight": (N // count, K + extra), "scale": (N // count,), "sources": (t.numel(),)}
    if t.shape != shapes[leaf]:
        return f"has shape {tuple(t.shape)} and not {shapes[leaf]}"
    if leaf == "weight":
        return why_not_integers(t, m.bits)
    if leaf == "scale" and not bool((t.isfinite() & (t >= 0)).all()):
        return "has a number that is negative or not finite"
    return why_not_sources(t, K) if leaf == "sources" else None
