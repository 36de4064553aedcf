"""The engine of every training: steps, runs, checkpoints that resume bitwise, several processes.

Pretraining was here in version 0.1; its names stay.
"""

from fastbert._lazy import lazy

__all__ = ["PretrainConfig", "Result", "pretrain"]

__getattr__ = lazy(
    __name__,
    {
        "PretrainConfig": "fastbert.pretrain.config",
        "Result": "fastbert.pretrain.run",
        "pretrain": "fastbert.pretrain.run",
    },
)
