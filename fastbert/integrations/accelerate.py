"""accelerate() and restore(): they change the classes of a loaded model's modules, in place, and nothing else."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import TypeVar

from torch import nn

from fastbert import nn as drop_in
from fastbert.integrations.families import FAMILIES

_log = logging.getLogger("fastbert")
M = TypeVar("M", bound=nn.Module)

_TORCH: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: drop_in.LayerNorm,
    nn.GELU: drop_in.GELU,
    nn.CrossEntropyLoss: drop_in.CrossEntropyLoss,
    nn.MultiheadAttention: drop_in.MultiheadAttention,
    nn.TransformerEncoderLayer: drop_in.TransformerEncoderLayer,
    nn.TransformerEncoder: drop_in.TransformerEncoder,
}
# the attribute that holds a changed module's original class
_STOCK = "_fastbert_stock"


def accelerate(model: M) -> M:
    """Make a model's layers run on fastbert's kernels, in place, and return the model; restore() undoes it.

    Changes the class of every module that is exactly one of torch.nn's LayerNorm, GELU, CrossEntropyLoss,
    MultiheadAttention, TransformerEncoder, TransformerEncoderLayer, or one of transformers' BERT, RoBERTa, XLM-RoBERTa,
    CamemBERT, DistilBERT and ELECTRA encoders and heads, to a subclass of the same name. Modules, parameters, their
    names, state-dict keys, hooks and signatures stay the same. Where a layer cannot run on packed tokens, its original
    class's code runs and the log "fastbert" says why in one sentence: docs/accelerate.md. Raises TypeError for anything
    but a torch.nn.Module, and ValueError, before any change, for a layer that fully_shard has sharded already.
    """
    _check(model)
    _check_sharded(model)
    changed: Counter[str] = Counter()
    for m in model.modules():
        kind = _replacement(type(m))
        if kind is not None:
            setattr(m, _STOCK, type(m))
            m.__class__ = kind
            changed[kind.__name__] += 1
    if changed:
        _log.info("accelerate: %s", ", ".join(f"{n} {name}" for name, n in sorted(changed.items())))
    elif not is_accelerated(model):
        _log.warning(
            "accelerate: %s holds no layer that fastbert knows, nothing was changed: docs/accelerate.md lists them",
            type(model).__name__,
        )
    return model


def restore(model: M) -> M:
    """Give the modules that accelerate() changed their original classes back, and return the model.

    Raises ValueError, before any change, if another tool (fully_shard, parametrize) has changed the class of one of
    them since: undo that first.
    """
    _check(model)
    changed = [m for m in model.modules() if _STOCK in m.__dict__]
    for m in changed:
        if _replacement(m.__dict__[_STOCK]) is not type(m):
            raise ValueError(
                f"a {m.__dict__[_STOCK].__name__} became a {type(m).__name__} after accelerate(): undo that first"
            )
    for m in changed:
        m.__class__ = m.__dict__.pop(_STOCK)
        m.__dict__.pop("frozen", None)
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether accelerate() has changed a module of this model; raises TypeError for anything but a torch.nn.Module."""
    _check(model)
    return any(_STOCK in m.__dict__ for m in model.modules())


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: pass a torch.nn.Module, such as a model from from_pretrained"
        )


def _check_sharded(model: nn.Module) -> None:
    """Refuse sharded layers: fully_shard gives a module a class of its own, which has no replacement."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for m in model.modules():
        if isinstance(m, sharded) and _STOCK not in m.__dict__:
            kind = type(m).__mro__[2]
            if _replacement(kind) is not None:
                raise ValueError(
                    f"a {kind.__name__} is sharded already: call accelerate() before fully_shard()"
                )


def _replacement(kind: type[nn.Module]) -> type[nn.Module] | None:
    if kind.__module__ in FAMILIES:
        from fastbert.integrations import huggingface

        return huggingface.replacement(kind)
    return _TORCH.get(kind)
