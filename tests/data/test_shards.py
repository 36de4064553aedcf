"""Shards: their contents; they are opened again at once, and refused if stale, damaged or half-written."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from fastbert.data import (
    Shards,
    ShardsError,
    build_shards,
    load_tokenizer,
    read_documents,
    save_tokenizer,
    train_tokenizer,
)
from fastbert.data import shards as module
from fastbert.data.corpus import FileSource

TEXTS = [
    "The dog walks. A cat sees the dog.",
    "Old house, young cat! The dog runs.",
    "A cat. A dog. A house.",
]


@pytest.fixture
def folder(tmp_path):
    """Three short documents."""
    path = tmp_path / "in"
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text)
    return path


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def no_encoding(*_):
    raise AssertionError("the text was tokenised again")


def test_arrays_hold_the_documents(folder, small, tmp_path):
    shards = build_shards(folder, small, tmp_path / "out")
    sentences = [d.sentences() for d in read_documents(folder)]
    assert shards.documents.tolist() == [0, 2, 4, 7]
    assert shards.tokens.dtype == np.uint16
    assert shards.sentences.dtype == shards.documents.dtype == np.int64
    flat = [s for document in sentences for s in document]
    for number, sentence in enumerate(flat):
        start, end = shards.sentences[number : number + 2]
        expected = small.encode(sentence, add_special_tokens=False).ids
        assert shards.tokens[start:end].tolist() == expected
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["documents"], manifest["sentences"], manifest["tokens"]) == (
        3,
        7,
        len(shards.tokens),
    )


def test_byte_level_sentences_join_to_the_text(some, bpe, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(some[0].text)
    shards = build_shards(path, bpe, tmp_path / "out")
    assert bpe.decode(shards.tokens.tolist()) == " ".join(some[0].paragraphs)


def test_special_tokens_in_the_text_are_text(small, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("The dog [SEP] a cat [MASK] [PAD] runs.")
    shards = build_shards(path, small, tmp_path / "out")
    special = {small.token_to_id(t) for t in ("[SEP]", "[MASK]", "[PAD]")}
    assert not special & set(shards.tokens.tolist())
    # the caller's tokenizer still encodes them as special tokens
    assert small.encode("[MASK]").tokens == ["[CLS]", "[MASK]", "[SEP]"]


def test_large_vocabularies_are_four_bytes_wide(tmp_path):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(66_000))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    (tmp_path / "a.txt").write_text("w65999 w1 w65531.")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    shards = build_shards(tmp_path / "a.txt", tokenizer, tmp_path / "out")
    assert shards.tokens.dtype == np.uint32
    assert shards.tokens.tolist() == [66_004, 6, 65_536, 1]


def test_a_second_run_opens_what_is_there(folder, small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = build_shards(folder, small, out)
    before = contents(out)
    monkeypatch.setattr(module, "_encode", no_encoding)
    # padding, truncation and the place of the text do not make it another text
    small_copy = type(small).from_str(small.to_str())
    small_copy.enable_truncation(7)
    small_copy.enable_padding()
    folder.rename(tmp_path / "moved")
    again = build_shards(tmp_path / "moved", small_copy, out)
    assert contents(out) == before
    assert np.array_equal(again.tokens, first.tokens)
    with pytest.raises(AssertionError, match="tokenised again"):
        build_shards(tmp_path / "moved", small, out, rebuild=True)
    assert contents(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moved", "out"]


def test_unchanged_times_spare_the_hashing(folder, small, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert.data.corpus._SETTLED_NS", 0)
    build_shards(folder, small, tmp_path / "out")
    hashed = []
    fingerprint = FileSource.fingerprint
    monkeypatch.setattr(
        FileSource, "fingerprint", lambda s: hashed.append(s.path.name) or fingerprint(s)
    )
    build_shards(folder, small, tmp_path / "out")
    assert hashed == []
    (folder / "1.txt").write_text(TEXTS[1])
    build_shards(folder, small, tmp_path / "out")
    assert hashed == ["1.txt"]


def test_progress_is_shown(folder, small, tmp_path, capsys):
    build_shards(folder, small, tmp_path / "out", progress=True)
    assert "tokenising" in capsys.readouterr().out


def test_stdin_makes_shards_and_finds_them_again(small, tmp_path, monkeypatch):
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXTS[0].encode())))
        shards = build_shards("-", small, tmp_path / "out")
        assert len(shards.documents) == 2
        monkeypatch.setattr(module, "_encode", no_encoding)


def test_a_dataset_makes_shards_and_stales_them(small, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": TEXTS, "id": [1, 2, 3]}
    first = build_shards(datasets.Dataset.from_dict(rows), small, tmp_path / "out")
    assert len(first.documents) == 4
    build_shards(datasets.Dataset.from_dict(rows | {"id": [4, 5, 6]}), small, tmp_path / "out")
    with pytest.raises(ShardsError, match="the text of the dataset has changed"):
        build_shards(datasets.Dataset.from_dict({"text": TEXTS[::-1]}), small, tmp_path / "out")


def edit(folder):
    # the new text has the same length
    (folder / "1.txt").write_text(TEXTS[1].replace("Old", "New"))


def add(folder):
    (folder / "3.txt").write_text("A new one.")


def as_jsonl(folder):
    (folder / "1.txt").unlink()
    (folder / "1.jsonl").write_text(json.dumps({"text": TEXTS[1]}))


STALE = {
    "text": (edit, {}, r"the text of .*1\.txt has changed"),
    "files": (add, {}, "there are 4 source files but were 3"),
    "kind": (as_jsonl, {}, r"the text of .*1\.jsonl has changed"),
    "separator": (lambda folder: None, {"separator": ""}, "separator is '' but was None"),
    "field": (lambda folder: None, {"field": "body"}, "field is 'body' but was 'text'"),
}


@pytest.mark.parametrize("case", STALE)
def test_stale_shards_are_refused(case, folder, small, tmp_path):
    change, options, sentence = STALE[case]
    out = tmp_path / "out"
    build_shards(folder, small, out)
    before = contents(out)
    change(folder)
    remedy = r": rebuild it \(rebuild=True, --rebuild\) or delete the folder$"
    with pytest.raises(ShardsError, match=f"out is stale, {sentence}{remedy}"):
        build_shards(folder, small, out, **options)
    assert contents(out) == before
    build_shards(folder, small, out, rebuild=True, **options)
    build_shards(folder, small, out, **options)
    assert contents(out) != before


def test_shards_of_another_tokenizer_or_other_rules_are_refused(
    folder, small, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    build_shards(folder, small, out)
    with pytest.raises(ShardsError, match="out is stale, the tokenizer has changed: rebuild it"):
        build_shards(folder, train_tokenizer(TEXTS, "wordpiece", 90), out)
    monkeypatch.setattr(module, "RULES_VERSION", 99)
    with pytest.raises(ShardsError, match="sentence rules is 99 but was 1"):
        build_shards(folder, small, out)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def rewrite(**changes):
    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


DAMAGED = {
    "truncated": ("tokens.bin", cut, r"tokens\.bin has \d+ bytes, expected \d+: rebuild it"),
    "corrupt": ("tokens.bin", flip, r"tokens\.bin is corrupt \(its checksum differs\): rebuild it"),
    "corrupt offsets": ("sentences.bin", flip, r"sentences\.bin is corrupt"),
    "missing": (
        "documents.bin",
        lambda p: p.unlink(),
        r"documents\.bin is missing, expected 32: rebuild",
    ),
    "half a manifest": ("manifest.json", cut, r"manifest\.json is damaged: rebuild it"),
    "other manifest": ("manifest.json", lambda p: p.write_text("[]"), r"manifest\.json is damaged"),
    "binary manifest": (
        "manifest.json",
        lambda p: p.write_bytes(b"\xff"),
        r"manifest\.json is damaged",
    ),
    "dtype": ("manifest.json", rewrite(dtype="O"), r"manifest\.json is damaged"),
    "format": ("manifest.json", rewrite(format=0), r"out has format 0, this is 1: rebuild it"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_shards_are_refused(case, folder, small, tmp_path):
    name, damage, sentence = DAMAGED[case]
    out = tmp_path / "out"
    build_shards(folder, small, out)
    damage(out / name)
    for attempt in (lambda: Shards.open(out), lambda: build_shards(folder, small, out)):
        with pytest.raises(ShardsError, match=sentence):
            attempt()
    assert len(build_shards(folder, small, out, rebuild=True).documents) == 4


def test_folders_that_hold_something_else_are_left_alone(folder, small, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"in holds no manifest\.json: build the shards first"
    ):
        Shards.open(folder)
    for rebuild in (False, True):
        with pytest.raises(
            ValueError, match=r"in is no shard folder \(it holds \d\.txt\): choose another"
        ):
            build_shards(folder, small, folder, rebuild=rebuild)
    assert len(list(folder.iterdir())) == 3


def test_text_without_tokens_is_refused(small, tmp_path):
    (tmp_path / "a.txt").write_text("\u200b \u0085 \ufffd")
    with pytest.raises(ValueError, match="the tokenizer makes no token of the sources' text"):
        build_shards(tmp_path / "a.txt", small, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("rebuild", [False, True])
def test_an_interrupt_leaves_nothing_half_written(rebuild, folder, small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if rebuild:
        build_shards(folder, small, out)
    before = contents(out) if rebuild else None
    encode = module._encode

    def interrupted(*arguments):
        yield next(encode(*arguments))
        assert any(".out.part" in p.name for p in tmp_path.iterdir()), "writing has begun"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_shards(folder, small, out, rebuild=rebuild)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["in", "out"] if rebuild else ["in"])
    assert not rebuild or contents(out) == before


def test_a_killed_build_is_swept_away_by_the_next(folder, small, tmp_path):
    save_tokenizer(small, tmp_path / "tokenizer")
    script = textwrap.dedent("""
        import os, signal, sys
        from fastbert.data import build_shards, load_tokenizer, shards
        encode = shards._encode
        def killed(*arguments):
            yield next(encode(*arguments))
            os.kill(os.getpid(), signal.SIGKILL)
        shards._encode = killed
        build_shards(sys.argv[1], load_tokenizer(sys.argv[2]), sys.argv[3])
    """)
    out = tmp_path / "out"
    arguments = [str(folder), str(tmp_path / "tokenizer"), str(out)]
    path = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
    assert not out.exists()
    assert any(".out.part" in p.name for p in tmp_path.iterdir())
    # the folder of a process that is still running is left alone
    alive = tmp_path / f".out.part-{module.socket.gethostname()}-{os.getppid()}"
    alive.mkdir()
    assert len(build_shards(folder, small, out).documents) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [alive.name, "in", "out", "tokenizer"]


def test_the_first_of_two_builders_wins(folder, small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = module._write

    def overtaken(*arguments):
        write(*arguments)
        monkeypatch.setattr(module, "_write", write)
        # this process stands for the other one too: with another name its unfinished folder is not removed
        monkeypatch.setattr(module, "_beside", lambda f, p: f.with_name(f".{f.name}.{p}-other"))
        build_shards(folder, small, out)

    monkeypatch.setattr(module, "_write", overtaken)
    assert len(build_shards(folder, small, out).documents) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_split_is_by_whole_documents_and_seed(shards, everything):
    train, heldout = shards.split(0.05, seed=0)
    assert len(heldout) == 6
    assert sorted([*train, *heldout]) == everything.tolist()
    assert heldout.tolist() == shards.split(0.05, seed=0)[1].tolist()
    assert heldout.tolist() != shards.split(0.05, seed=1)[1].tolist()
    assert len(shards.split(0.0, seed=0)[1]) == 0
    # a larger held-out part contains the smaller one
    assert set(heldout) < set(shards.split(0.1, seed=0)[1])


def test_splits_that_leave_nothing_are_refused(folder, small, tmp_path):
    shards = build_shards(folder, small, tmp_path / "out")
    assert len(shards.split(0.05, 0)[1]) == 1
    with pytest.raises(
        ValueError, match="out has 3 documents, of which 2 would be held out: at least 2 must"
    ):
        shards.split(0.05, 0, least=2)
