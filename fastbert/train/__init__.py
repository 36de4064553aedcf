"""The engine of every training: steps, runs, checkpoints that resume bitwise, several processes.

In version 0.1 pretraining was here too: its names are lent from fastbert.pretrain.
"""

from fastbert._lazy import lazy

__all__ = ["LAMB", "Muon", "PretrainConfig", "Result", "pretrain"]

__getattr__ = lazy(
    __name__,
    {
        "LAMB": "fastbert.train.lamb",
        "Muon": "fastbert.train.muon",
        "PretrainConfig": "fastbert.pretrain.config",
        "Result": "fastbert.pretrain.run",
        "pretrain": "fastbert.pretrain.run",
    },
)
