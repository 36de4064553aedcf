"""The names of the backends and of the ops; no torch is imported here."""

from __future__ import annotations

BACKENDS = ("cpu", "triton", "cuda", "torch", "reference")


SLUGS = (
    "embed",
    "linear",
    "qkv_proj",
    "attention",
    "layer_norm",
    "dropout_add_layer_norm",
    "bias_gelu",
    "feed_forward",
    "cross_entropy",
    "mlm_loss",
)
