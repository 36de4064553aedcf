"""Text in and out: lines are the same for every reader, messages are short, and what a writer wrote is read back."""

import ast
import csv
import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_tensors

from fastbert import files
from fastbert.cli import text as text_commands
from fastbert.cli.app import LONGEST, main
from fastbert.cli.finetune import encoded
from fastbert.data import load_tokenizer, read_documents
from fastbert.finetune.config import FinetuneConfig, Options
from fastbert.finetune.records import read_records
from fastbert.train.settings import load_settings

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# what str.splitlines() takes for line ends besides LF, CRLF and CR, with blanks of several kinds, and letters
SEEMING = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
letters = st.sampled_from(
    [*SEEMING, *" \u00a0\u3000\ufeff\u200b\x7f,\"'#\\-=", *"abcéü世\U0001f600"]
)
any_text = st.text(st.one_of(letters, st.characters(exclude_categories=["Cs"])), max_size=12)
# a text with something to see, on one line
line = any_text.filter(lambda text: text.strip() and not set(text) & set("\r\n\0"))
lines = st.lists(line.filter(lambda text: text[0] != "\ufeff"), min_size=1, max_size=5)
ends = st.sampled_from(["\n", "\r\n", "\r"])


def written(folder, name, data):
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def stdin_of(data):
    return SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)


@quick
@given(lines, ends, st.booleans(), st.booleans())
@example(["the great film", "john\u2028smith", "the\x0cbank\x85of"], "\r\n", True, True)
def test_every_reader_finds_the_same_lines(tmp_path, texts, end, last, mark):
    """A line ends in LF, CRLF or CR and nowhere else; a byte order mark is no part of the first one."""
    data = ("\ufeff" * mark + end.join(texts) + end * last).encode()
    for name in ("a.txt", "a.txt.gz"):
        path = written(tmp_path, name, data)
        assert files.read_lines(path) == texts
        assert text_commands.read_lines(None, path) == texts
        squeezed = [" ".join(text.split()) for text in texts]
        found = [p for d in read_documents(path, separator="") for p in d.paragraphs]
        assert found == [text for text in squeezed if text]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin_of(data))
        assert text_commands.read_lines(None) == texts
    objects = end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path = written(tmp_path, "a.jsonl.gz", ("\ufeff" * mark + objects).encode())
    assert [record.values["text"] for record in read_records(path)] == texts
    table = end.join(["text", *(text.replace("\t", " ") for text in texts)])
    path = written(tmp_path, "a.tsv", ("\ufeff" * mark + table).encode())
    assert [record.values["text"] for record in read_records(path)] == [
        text.replace("\t", " ") for text in texts
    ]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"a\nb\xff", "is not UTF-8 at byte 3 "),
        ("wide".encode("utf-16-le"), "has a zero byte near byte 1: it is not a text file"),
        ("wide".encode("utf-16"), "is not UTF-8 at byte 0 "),
    ],
)
def test_what_is_no_text(tmp_path, data, sentence):
    for name in ("a.csv", "a.csv.gz"):
        path = written(tmp_path, name, data)
        for reader in (files.read_lines, files.read_text, read_records):
            with pytest.raises(ValueError, match=name) as caught:
                reader(path)
            assert sentence in str(caught.value)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    with pytest.raises(ValueError, match=r"b\.gz is a broken gzip file"):
        files.read_lines(tmp_path / "b.gz")


def test_messages_quote_the_ends_of_a_long_value():
    assert files.quoted("short") == "'short'"
    assert files.quoted([1, "a"]) == "[1, 'a']"
    for value in ("x" * 10**5, ["word"] * 10**5, {"k" * 10**4: ["v" * 10**4]}, "\n" * 10**5):
        assert len(files.quoted(value)) < 210
    assert files.listed("abc") == "a, b, c"
    assert files.listed(range(100), 3) == "0, 1, 2 and 97 more"
    assert len(files.listed(["n" * 10**5] * 3)) < 400
    assert files.shortened("a" * 300 + "b", 40) == "a" * 20 + " ... " + "a" * 19 + "b"


def test_messages_quote_values_by_one_function():
    for path in Path(files.__file__).parent.rglob("*.py"):
        # a message of Python's own form about a name in code
        if path.name == "_lazy.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            whole = isinstance(node, ast.FormattedValue) and node.conversion == ord("r")
            assert not whole, (
                f"{path}:{node.lineno}: write {{quoted(x)}}, which shortens x, not {{x!r}}"
            )


def test_no_message_of_python_is_long(tmp_path):
    long = "v" * 90_000
    qas = {"id": long, "question": 1}
    squad = {"data": [{"paragraphs": [{"context": "c", "qas": [qas]}]}]}
    (tmp_path / "a.json").write_text(json.dumps(squad))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": long}))
    (tmp_path / "a.yaml").write_text(f"a: !{long} 1\n")
    (record,) = read_records(tmp_path / "a.json")
    for refused in (
        lambda: record.string("question"),
        lambda: load_tokenizer(tmp_path),
        lambda: load_settings(tmp_path / "a.yaml", FinetuneConfig),
        lambda: FinetuneConfig(task=long),
        lambda: FinetuneConfig(lr=[long] * 90),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            refused()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "a," * 20_000 + "b\nx\n"),
        ("a.csv", "text,text," + "n" * 90_000 + "\nx\n"),
        ("a.csv", "text,label\n" + "x," * 40_000),
        ("a.jsonl", json.dumps({"k" * 50_000: 1, "text": "x"})),
        ("a.jsonl", json.dumps(["x"] * 50_000)),
        ("a.jsonl", json.dumps({"text": {"x": "y" * 90_000}, "label": 1})),
        ("a.jsonl", "1" * 90_000),
        ("a.json", json.dumps({"data": {"x" * 90_000: 1}})),
        ("a." + "x" * 200, ""),
        ("x" * 300 + ".csv", None),
    ],
)
def test_no_refusal_is_long(tmp_path, content, name, capsys):
    if content is not None:
        (tmp_path / name).write_text(content)
    words = ["finetune", str(tmp_path / name), "--task", "classify", "--model", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--out", str(tmp_path / "run"), "--label", "l" * 90_000])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert (error.count("\n"), len(error) <= LONGEST + 20) == (1, True)


vectors = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3
)


@quick
@given(st.lists(st.tuples(line, vectors), min_size=1, max_size=4))
def test_files_of_vectors_are_read_back(rows):
    texts = [text for text, _ in rows]
    wanted = np.array([vector for _, vector in rows], np.float32)
    given_vectors = torch.from_numpy(wanted)
    as_file = {s: text_commands._encoded(s, texts, given_vectors) for s in text_commands.FORMATS}
    assert np.array_equal(np.load(io.BytesIO(as_file[".npy"])), wanted)
    assert np.array_equal(load_tensors(as_file[".safetensors"])["embeddings"], wanted)
    # a program that takes U+2028 and the like for line ends reads the same
    for objects in (as_file[".jsonl"].decode().splitlines(), as_file[".jsonl"].split(b"\n")[:-1]):
        found = [json.loads(each) for each in objects]
        assert [each["text"] for each in found] == texts
        assert np.array_equal(np.array([each["vector"] for each in found], np.float32), wanted)


predictions = st.lists(
    st.fixed_dictionaries(
        {"text": any_text, "probability": st.floats(0, 1)},
        optional={
            "id": any_text,
            "margin": st.floats(allow_nan=False, allow_infinity=False),
            "words": st.lists(any_text),
            "entities": st.lists(st.dictionaries(any_text, st.integers(), max_size=2), max_size=2),
        },
    ),
    min_size=1,
    max_size=4,
)


@quick
@given(predictions)
@example([{"text": "a"}, {"text": "b", "margin": 1.0}])
@example([{"text": "a\0"}])
def test_files_of_predictions_are_read_back(rows):
    objects = encoded(".jsonl", rows)
    assert [json.loads(each) for each in objects.splitlines()] == rows
    if any("\0" in value for row in rows for value in row.values() if isinstance(value, str)):
        with pytest.raises(ValueError, match="can't hold the zero character"):
            encoded(".csv", rows)
        return
    table = list(csv.DictReader(io.StringIO(encoded(".csv", rows), newline="")))
    assert len(table) == len(rows)
    for found, row in zip(table, rows, strict=True):
        for name, value in row.items():
            assert (found[name] if isinstance(value, str) else json.loads(found[name])) == value
        assert not any(found[name] for name in found.keys() - row.keys())


@quick
@given(any_text, st.lists(any_text, max_size=2), st.floats(1e-30, 1e30), st.booleans())
@example("\x7f", ['\x85\u2028\r\n\t"\\'], 1e-5, True)
def test_files_of_settings_are_read_back(tmp_path, name, sources, rate, flag):
    config = FinetuneConfig(sources=sources, text=name, lr=rate, recompute=flag)
    for mark in ("", "\ufeff"):
        (tmp_path / "a.toml").write_bytes((mark + config.to_toml()).encode())
        again = FinetuneConfig(**load_settings(tmp_path / "a.toml", FinetuneConfig))
        assert again == config
    options = Options("tag", 9, text=name)
    options.save(tmp_path)
    assert Options.load(tmp_path) == options
    with pytest.raises(ValueError, match=r"text is .*half a surrogate pair at character 1"):
        FinetuneConfig(text="a\udc80")
