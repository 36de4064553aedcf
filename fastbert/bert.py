"""BERT, RoBERTa, DistilBERT, ModernBERT and GPT-2 with their heads; a family is an argument of BertConfig, not a class.

Tokens are packed inside. Padding is removed once, before the embeddings (one host sync), and comes back only in the
outputs, as zeros. A caller with packed tokens passes input_ids (T,), cu_seqlens (B + 1,) int32 and max_seqlen; this
needs no sync, and outputs stay packed. Arguments and outputs are named as in transformers; every forward also takes
output_hidden_states, output_attentions, cu_seqlens and max_seqlen.
"""

from fastbert.models.config import BertConfig
from fastbert.models.decoder import GPTForCausalLM
from fastbert.models.encoder import BertModel
from fastbert.models.heads import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from fastbert.models.output import Output

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "GPTForCausalLM",
    "Output",
]
