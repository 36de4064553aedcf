"""The names of the backends and of the ops, and the backend that the environment forces; no torch is imported here."""

from __future__ import annotations

import os
from typing import NamedTuple

from fastbert.files import quoted


class StaleModuleError(ImportError):
    """A native module does not belong to this version of fastbert; the message has the remedy."""


class Backend(NamedTuple):
    """Where a backend is, and which calls try it."""

    # one module per op, each with `unsupported`, `forward` and `backward`
    package: str
    # the type of device that its kernels take tensors of, None for every type
    device: str | None
    # False: a call runs here only where the backend is forced by name
    tried: bool = True


# {name: backend}: a call tries those of its device in this order. `torch` takes every call, so it is the last one tried
TABLE = {
    "cpu": Backend("fastbert.backend.cpu", "cpu"),
    "triton": Backend("fastbert.kernels", "cuda"),
    "cuda": Backend("fastbert.backend.cuda", "cuda"),
    "torch": Backend("fastbert.backend.stock", None),
    "reference": Backend("fastbert.backend.reference", None, tried=False),
}
BACKENDS = tuple(TABLE)

# the backend that FASTBERT_BACKEND forces
FORCED = os.environ.get("FASTBERT_BACKEND") or None
# why there is no such backend. A typo in a variable that forces something must not pass: no op and no command runs
WHY_NOT_FORCED = (
    None
    if FORCED in (None, *BACKENDS)
    else f"FASTBERT_BACKEND is {quoted(FORCED)}: choose one of {', '.join(BACKENDS)}, or unset it"
)

SLUGS = (
    "embed",
    "linear",
    "linear_int8",
    "qkv_proj",
    "attention",
    "layer_norm",
    "dropout_add_layer_norm",
    "rms_norm",
    "bias_gelu",
    "feed_forward",
    "gated_feed_forward",
    "cross_entropy",
    "mlm_loss",
    "relation_loss",
    "lstm",
)
