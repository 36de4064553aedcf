"""The public ops. Each op's docstring has its shapes and its contract; docs/ops.md has the table of dtypes."""

from fastbert.backend.reference.attention_form import Rotary
from fastbert.ops._relative_bias import alibi_bias, relative_bias
from fastbert.ops.attention import attention
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.cross_entropy import cross_entropy
from fastbert.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastbert.ops.embed import embed
from fastbert.ops.feed_forward import feed_forward
from fastbert.ops.gated_feed_forward import gated_feed_forward
from fastbert.ops.layer_norm import layer_norm
from fastbert.ops.linear import linear
from fastbert.ops.linear_int8 import linear_int8
from fastbert.ops.lstm import lstm
from fastbert.ops.mlm_loss import mlm_loss
from fastbert.ops.qkv_proj import qkv_proj
from fastbert.ops.relation_loss import relation_loss
from fastbert.ops.rms_norm import rms_norm

__all__ = [
    "Rotary",
    "alibi_bias",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "dropout_add_layer_norm",
    "embed",
    "feed_forward",
    "gated_feed_forward",
    "layer_norm",
    "linear",
    "linear_int8",
    "lstm",
    "mlm_loss",
    "qkv_proj",
    "relation_loss",
    "relative_bias",
    "rms_norm",
]
