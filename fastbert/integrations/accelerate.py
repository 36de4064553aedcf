"""accelerate() and restore(): they change the classes of a loaded model's modules, in place, and nothing else."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import TypeVar

from torch import nn

from fastbert import nn as drop_in
from fastbert.files import quoted
from fastbert.integrations.known_families import FAMILIES
from fastbert.nn.watch import hooked_by

_log = logging.getLogger("fastbert")
M = TypeVar("M", bound=nn.Module)

_TORCH: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: drop_in.LayerNorm,
    nn.RMSNorm: drop_in.RMSNorm,
    nn.GELU: drop_in.GELU,
    nn.CrossEntropyLoss: drop_in.CrossEntropyLoss,
    nn.MultiheadAttention: drop_in.MultiheadAttention,
    nn.TransformerEncoderLayer: drop_in.TransformerEncoderLayer,
    nn.TransformerEncoder: drop_in.TransformerEncoder,
}
# the attribute that holds a changed module's original class
_STOCK = "_fastbert_stock"
# the attribute of encoders that says what their outputs at padding are, and its values
AT_PADDING_ATTRIBUTE = "fastbert_at_padding"
AT_PADDING = ("auto", "zeros", "stock")


def accelerate(model: M, *, at_padding: str | None = None) -> M:
    """Make a model's layers run on fastbert's kernels, in place, and return the model; restore() undoes it.

    Changes the class of every module that is exactly one of torch.nn's LayerNorm, RMSNorm, GELU, CrossEntropyLoss,
    MultiheadAttention, TransformerEncoder, TransformerEncoderLayer, or an encoder or head of the families of
    transformers that docs/accelerate.md lists, to a subclass of the same name. Modules, parameters, their names,
    state-dict keys, hooks and signatures stay the same. Where a layer cannot run on packed tokens, its original
    class's code runs and the log "fastbert" says why in one sentence: docs/accelerate.md.

    `at_padding` says what an encoder's outputs at masked positions are. "zeros": zeros, and nothing is computed there.
    "stock": what the original class gives, at the cost of computing it. "auto", the default: zeros, but "stock" where
    these outputs may be used: at masked positions of a transformers model whose id is not config.pad_token_id, and in
    torch.nn's encoders of a model that has a torch.nn.TransformerDecoderLayer. None keeps an earlier call's value.

    Raises TypeError for anything but a torch.nn.Module. Raises ValueError, before any change, for another `at_padding`,
    and for a layer that fully_shard has sharded, or whose class Opacus has looked up, already.
    """
    _check(model)
    at_padding = _chosen(model) if at_padding is None else at_padding
    if at_padding not in AT_PADDING:
        raise ValueError(f"at_padding is {quoted(at_padding)}: pass one of {', '.join(AT_PADDING)}")
    _check_order(model)
    changed: Counter[str] = Counter()
    for m in model.modules():
        kind = _replacement(type(m))
        if kind is not None:
            setattr(m, _STOCK, type(m))
            m.__class__ = kind
            changed[kind.__name__] += 1
    _set_at_padding(model, at_padding)
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
        for name in ("frozen", AT_PADDING_ATTRIBUTE):
            m.__dict__.pop(name, None)
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


def _chosen(model: nn.Module) -> str:
    """The at_padding of an earlier call, where all of its encoders have the same; "auto" otherwise."""
    changed = [
        m for m in model.modules() if _STOCK in m.__dict__ and hasattr(m, AT_PADDING_ATTRIBUTE)
    ]
    found = {getattr(m, AT_PADDING_ATTRIBUTE) for m in changed}
    return found.pop() if len(found) == 1 else "auto"


def _set_at_padding(model: nn.Module, chosen: str) -> None:
    """Write the choice to all encoders."""
    # a decoder attends to its encoder's outputs at padding, unless a mask that it is given hides them
    decodes = any(isinstance(m, nn.TransformerDecoderLayer) for m in model.modules())
    for m in model.modules():
        if _STOCK in m.__dict__ and hasattr(type(m), AT_PADDING_ATTRIBUTE):
            read = decodes and chosen == "auto" and type(m) in _TORCH.values()
            setattr(m, AT_PADDING_ATTRIBUTE, "stock" if read else chosen)


def _check_order(model: nn.Module) -> None:
    """Refuse layers that fully_shard or Opacus has prepared: both go by a layer's class, which accelerate() changes."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for m in model.modules():
        if _STOCK in m.__dict__:
            continue
        kind = type(m).__mro__[2] if isinstance(m, sharded) else type(m)
        if _replacement(kind) is None:
            continue
        if isinstance(m, sharded):
            raise ValueError(
                f"a {kind.__name__} is sharded already: call accelerate() before fully_shard()"
            )
        if hooked_by(m, "opacus."):
            raise ValueError(
                f"Opacus has attached hooks to a {kind.__name__}: call accelerate() before GradSampleModule or "
                "PrivacyEngine.make_private()"
            )


def _replacement(kind: type[nn.Module]) -> type[nn.Module] | None:
    if kind.__module__ in FAMILIES:
        from fastbert.integrations import huggingface

        return huggingface.replacement(kind)
    return _TORCH.get(kind)
