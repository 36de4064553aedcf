"""From examples to a model's inputs and back: words and pieces, parts of long texts, entities, metrics."""

import numpy as np
import pytest
import tiny_tasks
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data import load_tokenizer
from fastbert.finetune.answer import Answer, overlap, plain
from fastbert.finetune.classify import Classify, Text
from fastbert.finetune.config import Options
from fastbert.finetune.features import Features, Shuffled, items, split
from fastbert.finetune.records import Record
from fastbert.finetune.tag import Tag, Words, entity_spans


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_tasks.base_model(tmp_path_factory.mktemp("base")))


def tokens(tokenizer, ids):
    return [tokenizer.id_to_token(int(i)) for i in ids]


def test_labels_stand_at_first_pieces(tokenizer):
    task = Tag(Options("tag", 32), ["B-PER", "I-PER", "O"])
    # the tokenizer removes the soft hyphen, which is still a word with a tag
    example = Words(("Unkindly", "met", "\u00ad", "Anna"), ("B-PER", "O", "O", "I-PER"))
    features = task.encode(tokenizer, [example])
    pieces = ["[CLS]", "un", "##kind", "##ly", "met", "[UNK]", "anna", "[SEP]"]
    assert tokens(tokenizer, features.ids[0]) == pieces
    assert features.targets["labels"][0].tolist() == [-100, 0, -100, -100, 2, 2, 1, -100]
    assert features.places[0].tolist() == [1, 4, 5, 6]


def test_long_sentences_lose_no_word(tokenizer):
    task = Tag(Options("tag", 8), ["B-PER", "O"])
    tags = tuple("B-PER" if i % 3 == 0 else "O" for i in range(20))
    example = Words(tuple(["Unkindly", "met"] * 10), tags)
    features = task.encode(tokenizer, [example, Words(("met",), ("O",))])
    assert features.owners == [0] * 10 + [1]
    assert max(map(len, features.ids)) <= 8
    # scores of the true tags give the true tags, across the parts too
    scores = [np.eye(2)[np.maximum(labels, 0)] for labels in features.targets["labels"]]
    found = task.predictions([example, Words(("met",))], features, scores)
    assert tuple(found[0]["tags"]) == tags
    assert found[1] == {"words": ["met"], "tags": ["O"], "entities": []}
    assert task.metrics([example], found[:1])["f1"] == 1.0


def test_a_word_longer_than_the_model(tokenizer):
    task = Tag(Options("tag", 8), ["B-X", "O"])
    features = task.encode(tokenizer, [Words(("unkind" + "ly" * 30, "met"), ("B-X", "O"))])
    assert features.cut == 1
    assert sum(len(p) for p in features.places) == 2
    assert max(map(len, features.ids)) <= 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("मुंबई भारत में है।", "मुंबई भारत में है ।"),
        ("தமிழ் மொழி, বাংলা ভাষা", "தமிழ் மொழி , বাংলা ভাষা"),
        ("عَرَبِيّ نص؟ שָׁלוֹם", "عَرَبِيّ نص ؟ שָׁלוֹם"),
        ("cafe\u0301 de Sa\u0303o 2.5 m² x_y", "cafe\u0301 de Sa\u0303o 2 . 5 m² x_y"),
        ("भारत-नेपाल don't", "भारत - नेपाल don ' t"),
        ("ภาษาไทยที่ ភ្នំពេញ", "ภาษาไทยที่ ភ្នំពេញ"),
        # a zero-width space is a blank; what joins letters, and a soft hyphen, are not
        ("ภาษา\u200bไทย می\u200cخواهم co\u00adop\u200f", "ภาษา ไทย می\u200cخواهم co\u00adop"),
        ("👩\u200d👧❤\ufe0fok 👍🏽🇩🇪🇫🇷🇩", "👩\u200d👧 ❤\ufe0f ok 👍🏽 🇩🇪 🇫🇷 🇩"),
        ("我爱北京，Tokyo東京タワーです", "我 爱 北 京 ， Tokyo 東 京 タ ワ ー で す"),
        ("한국어 텍스트", "한국어 텍스트"),
        ("\u200f \u200b\u2028\x1f\x1c", ""),
    ],
)
def test_words_of_a_text(text, words):
    """Marks stay with their letter, in every script; places lead back to the text."""
    found = Words.of_text(text)
    assert " ".join(found.words) == words
    assert tuple(text[start:end] for start, end in found.spans) == found.words


def test_chinese_words_as_in_the_training_data(tokenizer, tmp_path):
    in_characters = [Words(tuple("我爱北京x"), tuple("OOBIO")), Words(("Oslo",), ("B",))]
    in_words = [Words(("我", "爱", "北京", "x"), tuple("OOBO"))]
    for examples, words in ((in_characters, "我 爱 北 京"), (in_words, "我爱北京")):
        task = Tag(Options("tag", 32))
        task.learn(examples)
        task.options.save(tmp_path)
        options = Options.load(tmp_path)
        assert " ".join(Words.of_text("我爱北京", options.characters).words) == words
    # an entity of a text is written as it is there
    task = Tag(Options("tag", 32), ["B-LOC", "I-LOC", "O"])
    example = Words.of_text("在北京 市")
    features = task.encode(tokenizer, [example])
    scores = [np.eye(3)[[2, 2, 0, 1, 1, 2]]]
    (entity,) = task.predictions([example], features, scores)[0]["entities"]
    assert (entity["words"], entity["start"], entity["end"]) == ("北京 市", 1, 5)


TAGS = ["O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B", "E-B", "S-B"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(TAGS), min_size=1, max_size=12))
def test_entities_as_seqeval_reads_them(tags):
    from seqeval.metrics.sequence_labeling import get_entities

    assert [(k, i, j - 1) for k, i, j in entity_spans(tags)] == get_entities(tags)


def test_entities_in_every_scheme():
    expected = [("PER", 0, 2), ("LOC", 2, 3)]
    for tags in (
        "B-PER I-PER B-LOC O",
        "I-PER I-PER I-LOC O",
        "B-PER E-PER S-LOC O",
        "B-PER L-PER U-LOC O",
    ):
        assert list(entity_spans(tags.split())) == expected


def test_tag_metrics_by_hand():
    task = Tag(Options("tag", 32), ["B-LOC", "B-PER", "I-PER", "O"])
    true = [Words(tuple("abcd"), ("B-PER", "I-PER", "O", "B-LOC")), Words(("e",), ("O",))]
    guessed = [{"tags": ["B-PER", "O", "O", "B-LOC"]}, {"tags": ["B-PER"]}]
    values = task.metrics(true, guessed)
    # of two entities one is found whole; three are predicted
    assert (values["precision"], values["recall"]) == pytest.approx((1 / 3, 1 / 2))
    assert values["f1"] == pytest.approx(0.4)
    assert values["accuracy"] == pytest.approx(3 / 5)
    assert (values["f1_LOC"], values["f1_PER"]) == (1.0, 0.0)
    names, matrix = task.confusion(true, guessed)
    assert names == ["LOC", "O", "PER"]
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_tags_that_mark_no_entities():
    task = Tag(Options("tag", 32), ["DET", "NOUN", "O"])
    values = task.metrics([Words(("a", "b"), ("DET", "NOUN"))], [{"tags": ["DET", "O"]}])
    assert values == {"accuracy": 0.5}
    assert (task.metric, task.confusion([], [])[0]) == ("accuracy", ["DET", "NOUN", "O"])


def test_pairs_and_their_types(tokenizer):
    task = Classify(Options("classify", 10, pair="b"), ["no", "yes"])
    example = task.read(Record("x", {"text": "the man", "b": "a film " * 9, "label": "yes"}), True)
    features = task.encode(tokenizer, [example])
    expected = ["[CLS]", "the", "man", "[SEP]", "a", "film", "a", "film", "a", "[SEP]"]
    assert tokens(tokenizer, features.ids[0]) == expected
    assert features.types[0].tolist() == [0] * 4 + [1] * 6
    assert (features.cut, features.targets["labels"][0].tolist()) == (1, [1])


def test_classification_metrics_agree_with_scikit_learn():
    from sklearn import metrics

    draw = np.random.default_rng(0)
    names = ["a", "b", "c"]
    true, guessed = (draw.choice(names, 50).tolist() for _ in range(2))
    task = Classify(Options("classify", 32), names)
    examples = [Text("x", None, t) for t in true]
    predictions = [{"label": g} for g in guessed]
    values = task.metrics(examples, predictions)
    assert values["accuracy"] == pytest.approx(metrics.accuracy_score(true, guessed))
    assert values["f1"] == pytest.approx(metrics.f1_score(true, guessed, average="macro"))
    assert (
        task.confusion(examples, predictions)[1] == metrics.confusion_matrix(true, guessed)
    ).all()
    assert values["accuracy_low"] < values["accuracy"] < values["accuracy_high"]


def test_labels_are_ordered_as_people_expect():
    task = Classify(Options("classify", 32))
    task.learn([Text("x", None, label) for label in ("10", "9", "b", "a", "-1")])
    assert task.names == ["-1", "9", "10", "a", "b"]


@pytest.mark.parametrize("stride", [0, 8])
def test_answers_survive_every_cut(tokenizer, stride):
    """From scores at the targets only, each answer of long and short texts comes back exactly."""
    rows = tiny_tasks.questions(30)
    rows.append(
        {
            "question": "who " * 40,
            "context": "the man saw " * 30 + "Anna-Maria .",
            "answer": "Anna-Maria",
        }
    )
    task = Answer(Options("answer", 24, stride=stride))
    examples = [task.read(Record("x", row), True) for row in rows]
    features = task.encode(tokenizer, examples)
    assert features.cut == 1
    assert len(features) > len(examples)
    assert max(map(len, features.ids)) == 24
    scores = []
    for ids, start, end in zip(features.ids, *features.targets.values(), strict=True):
        values = np.full((len(ids), 2), -5.0, np.float32)
        values[start[0], 0] = values[end[0], 1] = 5.0
        scores.append(values)
    found = task.predictions(examples, features, scores)
    assert [p["answer"] for p in found] == [e.answers[0][0] for e in examples]
    for p, e in zip(found, examples, strict=True):
        assert e.context[p["start"] : p["end"]] == p["answer"]
    assert task.metrics(examples, found) == {"exact": 1.0, "f1": 1.0}


def test_no_answer_wins_only_where_it_was_taught(tokenizer):
    for unanswerable, expected in ((True, ""), (False, "Anna")):
        task = Answer(Options("answer", 24, unanswerable=unanswerable))
        example = task.read(Record("x", {"question": "who", "context": "Anna met Karl"}), False)
        features = task.encode(tokenizer, [example])
        values = np.zeros((len(features.ids[0]), 2), np.float32)
        values[0], values[3] = 9.0, 1.0
        assert task.predictions([example], features, [values])[0]["answer"] == expected


def test_answers_are_no_longer_than_allowed(tokenizer):
    task = Answer(Options("answer", 24, longest_answer=2))
    example = task.read(Record("x", {"question": "who", "context": "Anna met Karl in Rome"}), False)
    features = task.encode(tokenizer, [example])
    values = np.zeros((len(features.ids[0]), 2), np.float32)
    # the end with the best score lies before the start, the next best too far after it
    values[5, 0], values[3, 1], values[7, 1], values[6, 1] = 9.0, 9.0, 8.0, 1.0
    assert task.predictions([example], features, [values])[0]["answer"] == "Karl in"


def test_squad_scores_by_hand():
    assert plain(" The  Cat's,  a hat! ") == "cats hat"
    assert overlap("the red car", "a blue car") == pytest.approx(0.5)
    assert (overlap("", ""), overlap("", "x"), overlap("the", "")) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"context": "x", "question": " ", "answers": []}, "question is ' ': it must be a text"),
        (
            {"context": "x", "question": "q", "answer": "x", "answer_start": 1e400},
            "must be a number",
        ),
        ({"context": "x", "question": "q"}, "has no field 'answers', only context, question"),
        ({"context": "x", "question": "q", "answers": "x"}, "pass text and answer_start"),
        ({"context": "x", "question": "q", "answer": "y"}, "'y' does not stand in the context"),
        (
            {"context": "ab", "question": "q", "answers": {"text": ["b"], "answer_start": [0]}},
            "'b' does not stand in the context at character 0",
        ),
    ],
)
def test_bad_questions(row, sentence):
    with pytest.raises(ValueError, match="here") as caught:
        Answer(Options("answer", 24)).read(Record("here", row), True)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "x"}, "has no field 'label', only text"),
        ({"text": "x", "label": 0.5}, "the label is 0.5: it must be the name or number of a class"),
        ({"text": "x", "label": None}, "the label is None"),
        ({"text": "x", "label": "a\ud800"}, "half a surrogate pair at character 1: repair it"),
        ({"text": "\ud800", "label": "a"}, "half a surrogate pair at character 0: repair it"),
        ({"text": "", "label": "a"}, "text is '': it must be a text"),
    ],
)
def test_bad_texts(row, sentence):
    with pytest.raises(ValueError, match="here") as caught:
        Classify(Options("classify", 24)).read(Record("here", row), True)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"tokens": ["a"]}, "has no field 'tags', only tokens"),
        ({"tokens": "a b", "tags": ["O"]}, "tokens is 'a b': it must be a list of texts"),
        ({"tokens": [], "tags": []}, "tokens is []"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "has 2 words and 1 tags"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "no text: number 1 is None"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "no text: number 1 is ''"),
        ({"tokens": ["\ud800"], "tags": ["O"]}, "half a surrogate pair at character 0"),
        ({"tokens": ["a"] * 90_000, "tags": [0.5] * 90_000}, "no text: number 0 is 0.5"),
    ],
)
def test_bad_sentences(row, sentence):
    with pytest.raises(ValueError, match="here") as caught:
        Tag(Options("tag", 24)).read(Record("here", row), True)
    assert sentence in str(caught.value)


def test_batches_depend_on_their_number_only():
    features = Features()
    for i in range(10):
        features.add([i] * (i + 1), [0] * (i + 1), i, labels=[i % 2])
    data = Shuffled(features, 4, seed=3)
    stream = data.stream()
    batches = [next(stream) for _ in range(6)]
    assert [(b.epoch, b.number) for b in batches] == [(e, n) for e in (0, 1) for n in range(3)]
    assert sorted(i for b in batches[:3] for i in b.examples) == list(range(10))
    assert batches[0].examples != batches[3].examples
    again = data.batch(1, 2)
    assert again.examples == batches[5].examples
    assert again["input_ids"].tolist() == batches[5]["input_ids"].tolist()
    assert (len(again["cu_seqlens"]) - 1, items(again)) == (2, 2)
    assert next(data.stream(1, 2)).examples == again.examples


def test_groups_are_held_out_whole():
    groups = [i // 3 for i in range(30)]
    kept, held = split(groups, 0.2, seed=1)
    assert sorted(kept + held) == list(range(30))
    assert {groups[i] for i in kept}.isdisjoint(groups[i] for i in held)
    assert len(held) == 6
    assert split(groups, 0.2, seed=2)[1] != held
    # for any share neither side is empty
    assert all(split([0, 1], share, 0) for share in (0.0, 0.99))


def test_tags_need_one_token_at_each_end(tmp_path):
    tokenizer = load_tokenizer(tiny_tasks.base_model(tmp_path))
    tokenizer.post_processor = None
    with pytest.raises(ValueError, match=r"puts \[\] around a text: tags need \[CLS\] before and"):
        Tag(Options("tag", 8), ["B-X", "O"]).encode(tokenizer, [Words(("met",))])
