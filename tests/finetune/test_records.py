"""Labelled data in all its forms, and the sentence for each unreadable file."""

import csv
import gzip
import json

import datasets
import pytest
import tiny_tasks

from fastbert.finetune.records import read_records


def written(tmp_path, name, text):
    path = tmp_path / name
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def values(source, **options):
    return [dict(record.values) for record in read_records(source, **options)]


def test_tables_agree(tmp_path):
    rows = [{"text": 'He said "no", twice', "label": "a"}, {"text": "two\nlines", "label": "b"}]
    text = 'text,label\r\n"He said ""no"", twice",a\r\n"two\nlines",b\r\n'
    # with a byte order mark, as spreadsheets write it
    assert values(written(tmp_path, "a.csv", "\ufeff" + text)) == rows
    assert values(tiny_tasks.write_jsonl(tmp_path / "a.jsonl", rows)) == rows
    assert values(written(tmp_path, "a.json", json.dumps(rows))) == rows
    tabs = written(tmp_path, "a.tsv", 'text\tlabel\nan inch is 1"\tb\n')
    assert values(tabs) == [{"text": 'an inch is 1"', "label": "b"}]


def test_places_name_the_line(tmp_path):
    path = written(tmp_path, "a.csv", 'text,label\n"two\nlines",x\nlast,y\n')
    assert [r.place for r in read_records(path)] == [f"{path}:3", f"{path}:4"]


def test_conll(tmp_path):
    rows = tiny_tasks.sentences(3)
    assert values(tiny_tasks.write_conll(tmp_path / "a.txt", rows), conll=True) == rows
    bare = written(tmp_path, "b.conll", "One\nTwo\n\n\nThree\n")
    assert values(bare, conll=True) == [{"tokens": ["One", "Two"]}, {"tokens": ["Three"]}]


def test_cells_and_rows_of_any_length(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"text": "word " * 40_000, "label": "a"}, {"text": "x", "label": "b"}]
    for separator, name in ((",", "a.csv"), ("\t", "a.tsv"), (",", "a.csv.gz")):
        text = "\n".join(separator.join(row) for row in (rows[0], *(r.values() for r in rows)))
        assert values(written(tmp_path, name, "\n" + text)) == rows
    assert csv.field_size_limit() == limit


def test_tagged_tables_and_packed_files(tmp_path):
    rows = tiny_tasks.sentences(3)
    plain = tiny_tasks.write_conll(tmp_path / "a.txt", rows)
    for name in ("a.tsv", "b.conll.gz", "b.iob.gz"):
        path = written(tmp_path, name, plain.read_bytes().replace(b" ", b"\t"))
        assert values(path, conll=True) == rows
    path = tiny_tasks.write_jsonl(tmp_path / "a.jsonl", rows)
    assert values(written(tmp_path, "b.jsonl.gz", path.read_bytes())) == rows


def test_squad(tmp_path):
    text = """{"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "Anna met Karl.",
      "qas": [{"id": "7", "question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}]}]}]}]}"""
    (row,) = values(written(tmp_path, "a.json", text))
    assert (row["context"], row["question"], row["id"]) == ("Anna met Karl.", "Who?", "7")


def test_datasets_and_their_folders(tmp_path):
    labels = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    data = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [1, 0, -1]}, features)
    expected = [("x", "good"), ("y", "bad"), ("z", None)]
    assert [(r["text"], r["label"]) for r in values(data)] == expected
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(tmp_path / "d"))
    assert len(values(tmp_path / "d")) == 3
    assert len(values(tmp_path / "d", split="test")) == 1
    with pytest.raises(ValueError, match="no split 'validation', only train, test"):
        read_records(tmp_path / "d", "validation")
    tags = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(labels)}
    )
    data = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[0, 1]]}, tags)
    assert values(data) == [{"tokens": ["a", "b"], "tags": ["bad", "good"]}]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "", "a.csv holds no record"),
        ("a.csv", "text,label\n", "a.csv holds no record"),
        ("a.csv", "text,text\nx,y\n", "a.csv:1 names a column twice"),
        ("a.csv", "text,label\nx,y,z\n", "a.csv:2 has 3 fields and the heading 2"),
        ("a.csv", 'text,label\n"x,y\n', "a.csv:2 is not CSV"),
        ("a.csv", b"text\n\xff\n", "a.csv is not UTF-8 at byte 5"),
        ("a.jsonl", '{"text": 1}\n{', "a.jsonl:2 is not JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "a.jsonl:1 is not JSON"),
        ("a.tsv", "text\tlabel\nx\ty\tz\n", "a.tsv:2 has 3 fields and the heading 2"),
        ("a.jsonl", "[1]\n", "a.jsonl:1 is a list, not an object"),
        ("a.json", '{"a": 1}', "is neither a list of objects nor SQuAD"),
        ("a.json", '{"data": [{"paragraphs": [{}]}]}', "is not in SQuAD's layout"),
        ("a.conll", "One O\nTwo\n", "a.conll:2 has 1 columns and the lines before it 2"),
        ("a.xlsx", "x", "ends in '.xlsx': labelled data here is .csv, .tsv"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        read_records(written(tmp_path, name, text), conll=name.endswith("conll"))
    assert sentence in str(caught.value)


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        read_records(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="is no folder that datasets' save_to_disk wrote"):
        read_records(tmp_path)
