"""From text to masked batches: documents, tokenizer, shards on disk, examples and masks anew for every epoch.

documents = read_documents("speeches/")
tokenizer = train_tokenizer(documents, "wordpiece", 8000)
shards = build_shards(documents, tokenizer, "cache/")
data = PretrainingData(shards, tokenizer, DataSettings(max_length=128, batch_size=32))
for batch in data.stream(epoch=0, start=0):
    model(**batch).loss.backward()
"""

from fastbert.data.batching import Plan, PretrainingData
from fastbert.data.collate import Batch, MLMCollator, pad_batch
from fastbert.data.corpus import Document, Documents, read_documents
from fastbert.data.masking import Masked, Masker
from fastbert.data.pairs import Examples, full_sentences, sentence_pairs
from fastbert.data.sentences import split_sentences
from fastbert.data.settings import DataSettings
from fastbert.data.shards import Shards, ShardsError, build_shards
from fastbert.data.tokenizer import (
    SpecialIds,
    save_tokenizer,
    tokenizer_hash,
    vocabulary,
)
from fastbert.data.tokenizer_files import load_tokenizer
from fastbert.data.tokenizer_training import train_tokenizer

__all__ = [
    "Batch",
    "DataSettings",
    "Document",
    "Documents",
    "Examples",
    "MLMCollator",
    "Masked",
    "Masker",
    "Plan",
    "PretrainingData",
    "Shards",
    "ShardsError",
    "SpecialIds",
    "build_shards",
    "full_sentences",
    "load_tokenizer",
    "pad_batch",
    "read_documents",
    "save_tokenizer",
    "sentence_pairs",
    "split_sentences",
    "tokenizer_hash",
    "train_tokenizer",
    "vocabulary",
]
