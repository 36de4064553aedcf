"""Reading documents: every kind of source, sentences, and refusals."""

import gzip
import io
import json
import random
import re
import sys
from pathlib import Path

import pytest

from fastbert.data import build_shards, read_documents, split_sentences

TEXT = "The dog walks.\nThe cat\nruns near the house.\n\nA dog sees a cat.\n"
PARAGRAPHS = ("The dog walks. The cat runs near the house.", "A dog sees a cat.")


def stdin_of(data: bytes):
    return io.TextIOWrapper(io.BytesIO(data))


def texts(sources, **options):
    return [document.paragraphs for document in read_documents(sources, **options)]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    (document,) = read_documents(path)
    assert document.name == str(path)
    assert document.paragraphs == PARAGRAPHS
    assert document.text == "\n\n".join(PARAGRAPHS)
    assert document.sentences() == [
        "The dog walks.",
        "The cat runs near the house.",
        "A dog sees a cat.",
    ]


def test_a_separator_ends_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    assert texts(path, separator="") == [
        ("The dog walks.", "The cat", "runs near the house."),
        ("A dog sees a cat.",),
    ]
    path.write_text(f"==\n{TEXT}\n == \n\n==\nOld.")
    found = list(read_documents(path, separator="=="))
    assert [d.paragraphs for d in found] == [PARAGRAPHS, ("Old.",)]
    assert [d.name for d in found] == [f"{path}#1", f"{path}#2"]


def test_a_folder_is_read_sorted_and_recursively(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("Z.")
    (tmp_path / "c.jsonl").write_text('{"text": "C1."}\n\n{"text": ""}\n{"text": "C2.\\n\\nC3."}\n')
    (tmp_path / "a.txt").write_text("A.")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "D."}'))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"E."))
    (tmp_path / "README.md").write_text("not text")
    expected = [("A.",), ("Z.",), ("C1.",), ("C2.", "C3."), ("D.",), ("E.",)]
    documents = read_documents(tmp_path)
    assert [d.paragraphs for d in documents] == expected
    assert [d.paragraphs for d in documents] == expected, "a second pass reads the same"
    seen = []
    list(documents.read(seen.append))
    assert sum(seen) == documents.size


def test_stdin_is_read_as_often_as_needed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdin_of(TEXT.encode()))
    assert texts("-") == texts(["-"]) == [PARAGRAPHS]


def test_a_dataset_is_a_source():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": [TEXT, "", "Old."], "label": [1, 2, 3]})
    assert texts(rows, field="body") == [PARAGRAPHS, ("Old.",)]
    assert texts([rows, rows.select([0])], field="body")[-1] == PARAGRAPHS


@pytest.mark.parametrize(
    "sentences",
    [
        ["Mr. Smith went to the U.S. Senate in Dec. 1941.", "He spoke."],
        ['"Stop!" he said.', "She did (at once).", "Why?"],
        ["See No. 5 of Vol. 2.", "No.", "It is so."],
        ["1. First comes this.", "Second comes that."],
        [
            "J. Q. Adams and Gen. Grant, e.g. in St. Louis, met.",
            '"Good.',
            "Very good.”",
            "So it ended...",
        ],
        ["In 1990.", "25 people came, i.e. all."],
        ["You and I.", "Now we go."],
        ["你好。", "再见！", "好"],
        ["Así es.", "¿Qué?", "Élan vital."],
        ["no capital here. so no end"],
    ],
    ids=lambda sentences: sentences[0][:20],
)
def test_sentences(sentences):
    ideographic = sentences[0] == "你好。"
    assert split_sentences(("" if ideographic else " ").join(sentences)) == sentences


def test_sentences_lose_nothing():
    for _ in range(2000):
        text = "".join(random.choices("aB1 .!?\"'()。”\n", k=random.randrange(80)))
        found = split_sentences(text)
        assert "".join("".join(found).split()) == "".join(text.split())
        assert all(sentence == sentence.strip() != "" for sentence in found)


def dataset_dict(folder):
    datasets = pytest.importorskip("datasets")
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["A."]})})


def dataset_without_field(folder):
    return pytest.importorskip("datasets").Dataset.from_dict({"body": ["A."]})


def dataset_without_rows(folder):
    return pytest.importorskip("datasets").Dataset.from_dict({"text": []})


def dataset_with_null(folder):
    return pytest.importorskip("datasets").Dataset.from_dict({"text": ["A dog.", None]})


def no_file(folder):
    return folder / "nothing.txt"


def empty_folder(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def given_twice(folder):
    (folder / "bad.txt").write_text("A dog.")
    return [folder, folder / "bad.txt"]


def file(name, data):
    def write(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return write


ZIPPED = gzip.compress("\n".join(f"The dog {i} walks." for i in range(10000)).encode())
# (function that makes the source, type of the error, its sentence)
MALFORMED = {
    "invalid UTF-8": (
        file("bad.txt", b"A dog.\nA c\xe9t runs.\n"),
        ValueError,
        r"bad\.txt is not UTF-8 at byte 10 \(invalid continuation byte\): convert or repair it",
    ),
    "zero byte": (
        file("bad.txt", b"A dog.\nA\0cat."),
        ValueError,
        r"bad\.txt has a zero byte near byte 8: ",
    ),
    "empty file": (file("bad.txt", b""), ValueError, r"bad\.txt is empty: leave it out"),
    "blank file": (
        file("bad.txt", b" \n\n \t\n"),
        ValueError,
        r"bad\.txt holds no text: leave it out",
    ),
    "not gzip": (
        file("bad.txt.gz", b"A dog."),
        ValueError,
        r"bad\.txt\.gz is a broken gzip file \(Not a gz",
    ),
    "cut gzip": (
        file("bad.gz", ZIPPED[:-900]),
        ValueError,
        r"bad\.gz is a broken gzip file \(Compressed file ended",
    ),
    "corrupt gzip": (
        file("bad.gz", ZIPPED[:500] + bytes(40) + ZIPPED[540:]),
        ValueError,
        r"bad\.gz is (a broken gzip file|not UTF-8 at byte)",
    ),
    "broken JSON": (
        file("bad.jsonl", b'{"text": "A dog."}\n{"text": "A c'),
        ValueError,
        r"bad\.jsonl:2 is not JSON \(Unterminated string.*, column 10\): write one object a line",
    ),
    "JSON array": (
        file("bad.jsonl", b'["A dog."]'),
        ValueError,
        r"bad\.jsonl:1 is a JSON list, not an object",
    ),
    "missing field": (
        file("bad.jsonl", b'{"body": "A dog.", "id": 3}'),
        ValueError,
        r"bad\.jsonl:1 has no field 'text', only body, id: set field",
    ),
    "number": (
        file("bad.jsonl", b'{"text": 3}'),
        ValueError,
        r"bad\.jsonl:1: field 'text' is int, not a string",
    ),
    "half surrogate": (
        file("bad.jsonl", b'{"text": "A \\ud800 dog."}'),
        ValueError,
        r"bad\.jsonl:1: field 'text' holds half a surrogate pair at 2: repair it",
    ),
    "records without text": (
        file("bad.jsonl", b'{"text": ""}'),
        ValueError,
        r"bad\.jsonl holds no text: leave",
    ),
    "missing path": (
        no_file,
        FileNotFoundError,
        r"nothing\.txt does not exist: name a text file, a folder",
    ),
    "empty folder": (empty_folder, ValueError, r"empty holds no \*\.txt, \*\.jsonl, \*\.gz file"),
    "twice": (given_twice, ValueError, r"bad\.txt is given twice: name it once"),
    "nothing": (lambda folder: [], ValueError, r"no source is given: name a text file"),
    "wrong type": (
        lambda folder: [3],
        TypeError,
        r"a source is int: pass a path, - for stdin, or a datasets",
    ),
    "device": (
        lambda folder: "/dev/zero",
        ValueError,
        r"/dev/zero is not a regular file: pipe it in",
    ),
    "DatasetDict": (
        dataset_dict,
        TypeError,
        r"a source is a datasets\.DatasetDict: pass one split that is on disk",
    ),
    "dataset field": (
        dataset_without_field,
        ValueError,
        r"the dataset has no field 'text', only body: set field",
    ),
    "dataset rows": (dataset_without_rows, ValueError, r"the dataset has no rows: leave it out"),
    "dataset null": (
        dataset_with_null,
        ValueError,
        r"the dataset row 1: field 'text' is NoneType, not a string",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_sources_are_named_and_leave_nothing(case, tmp_path, small):
    make, error, sentence = MALFORMED[case]
    given_folder, out = tmp_path / "in", tmp_path / "out"
    given_folder.mkdir()
    out.mkdir()
    # a good source comes first, so that the build has begun to write
    (tmp_path / "good.txt").write_text(TEXT)
    source = make(given_folder)
    sources = [tmp_path / "good.txt", *(source if isinstance(source, list) else [source])]
    with pytest.raises(error, match=sentence):
        build_shards(sources if source != [] else [], small, out / "shards")
    assert list(out.iterdir()) == []


def test_empty_stdin_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdin_of(b""))
    with pytest.raises(ValueError, match="stdin is empty: pipe text into it"):
        read_documents("-")


def test_corrupt_stdin_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdin_of(b"A dog \xff"))
    with pytest.raises(ValueError, match="stdin is not UTF-8 at byte 6"):
        list(read_documents("-"))


def test_real_speeches(speeches):
    documents = list(speeches)
    assert len(documents) == 125
    sentences = [s for d in documents for s in d.sentences()]
    assert 35_000 < len(sentences) < 40_000
    words = [len(s.split()) for s in sentences]
    assert 24 < sum(words) / len(words) < 30
    ends = sum(bool(re.search(r"""[.!?:;…]["'”’)\]]*$""", s)) for s in sentences)
    assert ends / len(sentences) > 0.975
    first = Path(documents[0].name).name
    assert first == "1790-Washington-1.txt"
    assert json.dumps(documents[0].sentences()[0]).startswith('"Fellow-Citizens of the Senate')
