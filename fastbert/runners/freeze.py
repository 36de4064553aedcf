"""Prepacked weights for inference on the CPU: the encoder's layers run in one native call.

Not every write to a weight can be detected, so weights are packed only for a model that `freeze` was called on. The
copies are dropped at every change that can be detected: another module, parameter, setting or address, an optimiser's
step, an in-place write that increments the version counter, and another checksum of the weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbert.backend.reference.linear_int8 import LEVELS
from fastbert.files import quoted
from fastbert.models.encoder import BertModel
from fastbert.nn.blocks import QKVProjection
from fastbert.nn.int8 import Int8Embedding, Int8Linear
from fastbert.nn.int8_checks import why_not_numbers
from fastbert.nn.watch import log_once
from fastbert.runners.copies import WHOLE_FROM, Copies
from fastbert.runners.frozen import Frozen
from fastbert.runners.replace import is_replaced, replace_weights, set_bits


def freeze(model: nn.Module) -> nn.Module:
    """Use prepacked copies of the encoder's weights in inference (CPU, no gradient); returns the model in eval mode.

    Takes fastbert.bert's models, and transformers' after fastbert.accelerate; raises TypeError for others. The copies
    are made at the first forward under torch.no_grad() or torch.inference_mode(), or of a model without trainable
    weights, once per dtype of the activations (fp32, or bf16 under autocast), in addition to the weights:
    `frozen_bytes` returns their size. They are made again when a weight was written to, loaded, moved, replaced or
    stepped by an optimiser. Writes that PyTorch does not count (`.data`, numpy, memory shared with another process) are
    found by checksums: in the next call if they change whole weights, as moving averages do, within eight calls if they
    change whole rows, and in the next call of at least 1,024 tokens if they change single numbers. Call `freeze` again
    after a write to rows or numbers.
    """
    _check_model(model)
    if is_replaced(model):
        raise ValueError("the encoder's weights are int8: call quantize, which packs those")
    return _set_copies(model, None)


def quantize(
    model: nn.Module, bits: int = 12, *, replace: bool = False, embeddings: bool = False
) -> nn.Module:
    """Compute the encoder's products in integers in inference (CPU, no gradient); returns the model in eval mode.

    No calibration data: weights become int8 with one scale per row, activations integers of `bits` bits with one scale
    per token, at the time of the call. 8 bits lose accuracy; only processors with AVX-512 BF16 have a faster
    instruction for them. The sums are exact, and a token's scale comes from the token alone: a text's hidden states are
    bitwise the same alone, in any batch, with any padding and number of threads. Attention, GELU, residuals, norms and
    heads compute in floating point. A call that needs hidden states, attentions or gradients does so everywhere, with a
    warning.

    Takes the models that `freeze` takes, replaces its copies, and keeps to the same rules: the int8 copies are made at
    the first forward without gradients, in addition to the weights, and again when a weight changes; `frozen_bytes` is
    their size, a quarter of that of freeze's, and `unfreeze` drops them.

    With `replace` the encoder's weights themselves become int8, with the same results, and their memory is released:
    for good, and for fastbert.bert's models only. The encoder can't be trained then, save_pretrained writes int8, and
    from_pretrained reads it. With `embeddings` too the word embeddings become int8 rows, which changes results; a
    masked-LM decoder that is tied to them computes from the same integers. A model that is int8 already takes other
    `bits`. Raises ValueError for other `bits`, for layers that have no integer products or can't be replaced, and for
    weights that are not finite.
    """
    _check_model(model)
    if not isinstance(bits, int) or bits not in LEVELS:
        raise ValueError(f"bits is {quoted(bits)}: pass 12 or 8")
    if embeddings and not replace:
        raise ValueError("embeddings=True replaces the word embeddings: pass replace=True too")
    if replace:
        replace_weights(model, bits, embeddings)
        return model.eval()
    if reason := _why_not_quantised(model, bits):
        raise ValueError(f"the model can't be quantised: {reason}")
    set_bits(model, bits)
    return _set_copies(model, bits)


def quantize_loaded(model: Any) -> nn.Module:
    """Quantise a model of fastbert.bert, with the bits of its own int8 weights or with 12."""
    return quantize(model, model.config.int8_bits or 12)


def _why_not_quantised(model: nn.Module, bits: int) -> str | None:
    """Why a matrix of the encoders' layers can't become integers, None if all can."""
    for path, m in model.named_modules():
        copies = _copies_of(m, bits)
        if copies is None:
            continue
        for name, part in m.named_modules(prefix=path):
            if (
                isinstance(part, (nn.Linear, QKVProjection))
                # None was assigned; a weight that a parametrisation computes is no parameter at all
                and part._parameters.get("weight", 0) is None
            ):
                return f"{name} has no weight"
        # an encoder that is a whole model has embeddings too
        inside = "layers" if isinstance(getattr(m, "layers", None), nn.ModuleList) else ""
        prefix = ".".join(filter(None, (path, inside)))
        for name, p in m.get_submodule(inside).named_parameters(prefix):
            if p.dim() == 2 and (reason := why_not_numbers(p)):
                return f"{name} {reason}"
        if reason := copies.why_not_form(m):
            return f"its layers would compute in floating point, {reason}"
    return None


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: pass a fastbert.bert model, or an accelerated one"
        )


def _set_copies(model: nn.Module, bits: int | None) -> nn.Module:
    copies = [(m, _copies_of(m, bits)) for m in model.modules()]
    if all(empty is None for _, empty in copies):
        raise TypeError(
            f"{type(model).__name__} has no fastbert encoder: pass a fastbert.bert model, or an accelerated one"
        )
    for m, empty in copies:
        if empty is not None:
            m.frozen = empty  # type: ignore[assignment]
    name = "freeze" if bits is None else "quantize"
    log_once(
        f"{name}: a write through .data or numpy to rows of a weight may be seen after eight calls only, and one to "
        f"single numbers by calls of {WHOLE_FROM} tokens or more only: call {name} again after it"
    )
    return model.eval()


def unfreeze(model: nn.Module) -> nn.Module:
    """Drop the prepacked copies that `freeze` or `quantize` made; returns the model.

    Int8 weights stay int8, and the layers run one by one.
    """
    for m in model.modules():
        if isinstance(m, Int8Linear):
            m.unpack()
        if vars(m).get("frozen") is not None:
            m.frozen = None  # type: ignore[assignment]
    return model


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of all prepacked copies in the model, over and above its weights."""
    found = (vars(m).get("frozen") for m in model.modules())
    return sum(copies.nbytes() for copies in found if isinstance(copies, Copies))


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that a model holds: "int8" of int8 weights with their scales, "copies", as `frozen_bytes`, "others".

    The others are floating-point weights and buffers. A weight that is shared is counted once.
    """
    modules = [m for m in model.modules() if isinstance(m, (Int8Linear, Int8Embedding))]
    integers = {id(b): b.nbytes for m in modules for b in m.buffers(recurse=False)}
    tensors = (*model.parameters(), *model.buffers())
    return {
        "int8": sum(integers.values()),
        "copies": frozen_bytes(model),
        "others": sum(t.nbytes for t in tensors if id(t) not in integers),
    }


def _copies_of(m: nn.Module, bits: int | None) -> Copies | None:
    """New, empty copies for an encoder, None for any other module."""
    if isinstance(m, BertModel):
        return Frozen(bits)
    # an accelerated encoder's class names the copies that suit it
    kind = getattr(type(m), "fastbert_copies", None)
    return None if kind is None else kind(bits)
