"""Every implementation of the ops, and the only chooser between them, chooser.py. This package lends its names."""

from fastbert._lazy import lazy

_CHOOSER = (
    "ORDER",
    "Unsupported",
    "choose",
    "debug",
    "device_of",
    "forced",
    "matrix",
    "misset",
    "module",
    "order",
    "tuned_tables",
    "use",
)
__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(_CHOOSER, "fastbert.backend.chooser"),
        "BACKENDS": "fastbert.backend.names",
        "SLUGS": "fastbert.backend.names",
        "explain": "fastbert.tuning.explain",
    },
)
