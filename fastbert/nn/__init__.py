"""Drop-ins for torch.nn with the same constructors and state-dict keys, and BERT's own blocks.

A drop-in that cannot take its fast path runs torch.nn's code and logs the reason once (logger "fastbert").
docs/modules.md lists the cases. Encoders do not compute padding: their outputs there are zeros.
"""

from fastbert._lazy import lazy
from fastbert.nn.base import Linear
from fastbert.nn.blocks import (
    Embeddings,
    EncoderLayer,
    MLMHead,
    NSPHead,
    QKVProjection,
    SelfAttention,
    sinusoidal_positions,
)
from fastbert.nn.drop_in import GELU, CrossEntropyLoss, LayerNorm, RMSNorm
from fastbert.nn.feed_forward import FeedForward, GatedFeedForward
from fastbert.nn.int8 import Int8Embedding, Int8Linear
from fastbert.nn.lstm import LSTM
from fastbert.nn.packing import Packing
from fastbert.nn.transformer import (
    MultiheadAttention,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GELU",
    "LSTM",
    "CrossEntropyLoss",
    "Embeddings",
    "EncoderLayer",
    "FeedForward",
    "GatedFeedForward",
    "InferenceRunner",
    "Int8Embedding",
    "Int8Linear",
    "LayerNorm",
    "Linear",
    "MLMHead",
    "MultiheadAttention",
    "NSPHead",
    "Packing",
    "QKVProjection",
    "RMSNorm",
    "SelfAttention",
    "TrainingRunner",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "sinusoidal_positions",
]

# imported at first use: runners import models, which import this package
__getattr__ = lazy(
    __name__,
    {
        "InferenceRunner": "fastbert.runners.inference",
        "TrainingRunner": "fastbert.runners.training",
    },
)
