"""Tiny models and questions on texts of a few tokens, for the tests of fastbert.interpret."""

import torch

from fastbert.bert import BertConfig, BertForSequenceClassification
from fastbert.interpret import Question, class_target

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "num_labels": 3,
}
FORMS = {
    "bert": {},
    "roberta": {"model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"model_type": "distilbert"},
    "modernbert": {"model_type": "modernbert"},
    "modernbert-mean": {"model_type": "modernbert", "extra": {"classifier_pooling": "mean"}},
}


def model_of(kind=BertForSequenceClassification, form="bert", **changes):
    torch.manual_seed(0)
    model = kind(BertConfig(**SIZES | FORMS[form] | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0.0, 0.3)
    return model


def question_of(model, target=None, words=5, **changes):
    """A text of [CLS], `words` words and [SEP]."""
    ids = torch.tensor([2, *range(10, 10 + words), 3])
    fixed = torch.zeros(len(ids), dtype=torch.bool)
    fixed[[0, -1]] = True
    given = {"tokens": [str(i) for i in ids.tolist()], "types": torch.zeros_like(ids)}
    given |= {"ids": ids, "fixed": fixed, "mask_id": 4}
    return Question(model, target or class_target(model, 1), **given | changes)
