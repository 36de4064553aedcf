"""The collator for a user's own examples."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastbert.data import MLMCollator, SpecialIds

SENTENCES = [
    ("The state of the Union.", "It is free."),
    ("We the people", "of the United States"),
    ("No", "one"),
]


@pytest.fixture
def encodings(wordpiece):
    return wordpiece.encode_batch(SENTENCES)


def restored(batch):
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def test_every_kind_of_example_gives_the_same_batch(wordpiece, encodings):
    collate = MLMCollator(wordpiece)
    width = max(len(e.ids) for e in encodings) + 3
    kinds = {
        "encodings": encodings,
        "dicts": [{"input_ids": e.ids, "token_type_ids": e.type_ids} for e in encodings],
        "padded": [
            {
                "input_ids": torch.tensor(e.ids + [0] * (width - len(e.ids))),
                "token_type_ids": np.array(e.type_ids + [0] * (width - len(e.ids))),
                "attention_mask": [1] * len(e.ids) + [0] * (width - len(e.ids)),
                "special_tokens_mask": [0] * width,
            }
            for e in encodings
        ],
    }
    batches = {}
    for kind, examples in kinds.items():
        torch.manual_seed(3)
        batches[kind] = collate(examples)
    expected = [i for e in encodings for i in e.ids]
    for batch in batches.values():
        assert restored(batch).tolist() == expected
        assert batch["token_type_ids"].tolist() == [i for e in encodings for i in e.type_ids]
        assert batch["cu_seqlens"].dtype == torch.int32
        assert batch["cu_seqlens"].diff().tolist() == [len(e.ids) for e in encodings]
        assert batch["labels"].tolist() == batches["dicts"]["labels"].tolist()
        assert "next_sentence_label" not in batch
    torch.manual_seed(3)
    lists = collate([e.ids for e in encodings])
    assert lists["labels"].tolist() == batches["dicts"]["labels"].tolist()
    assert not lists["token_type_ids"].any()
    assert lists.identity == "a batch without number"


def test_padded_form(wordpiece, encodings):
    collators = [MLMCollator(wordpiece, padded=padded, multiple_of=16) for padded in (False, True)]
    batches = []
    for collate in collators:
        torch.manual_seed(0)
        batches.append(collate([{"input_ids": e.ids, "next_sentence_label": 1} for e in encodings]))
    packed, padded = batches
    assert padded["input_ids"].shape == (3, 16)
    mask = padded["attention_mask"].bool()
    assert torch.equal(padded["input_ids"][mask], packed["input_ids"])
    assert torch.equal(padded["labels"][mask], packed["labels"])
    assert set(padded["input_ids"][~mask].tolist()) == {SpecialIds.of(wordpiece).pad}
    assert (
        padded["next_sentence_label"].tolist()
        == packed["next_sentence_label"].tolist()
        == [1, 1, 1]
    )


def test_masks_are_dynamic_and_follow_the_seed(wordpiece, encodings):
    loader = DataLoader(
        encodings * 20, batch_size=30, collate_fn=MLMCollator(wordpiece, whole_word=True)
    )

    def epochs():
        torch.manual_seed(1)
        return [[b["labels"].tolist() for b in loader] for _ in range(2)]

    first, second = epochs()
    assert first != second
    assert [first, second] == epochs()


def test_bad_examples_are_refused(wordpiece):
    collate = MLMCollator(wordpiece)
    with pytest.raises(ValueError, match="there are no examples to make a batch of"):
        collate([])
    with pytest.raises(ValueError, match="example 1 has no tokens: leave it out"):
        collate([[2, 9, 3], []])
    with pytest.raises(ValueError, match=r"example 0 has input_ids \(3,\), token_type_ids \(2,\)"):
        collate([{"input_ids": [2, 9, 3], "token_type_ids": [0, 0]}])
    with pytest.raises(
        ValueError, match="next_sentence_label is in 1 of 2 examples: give it to all or none"
    ):
        collate([{"input_ids": [2, 9, 3], "next_sentence_label": 0}, [2, 9, 3]])
    with pytest.raises(
        IndexError, match="the ids go from 2 to 4000, the vocabulary from 0 to 3999"
    ):
        collate([[2, 4000, 3]])
