"""`fastbert finetune` and `fastbert predict`: files in, files out, and one sentence for each error."""

import csv
import io
import json

import pytest
import tiny_tasks
from typer.testing import CliRunner

from fastbert.cli.app import app, main
from fastbert.finetune.records import read_records


def command(*words, stdin=None):
    """The result of a command in this process, or the exception that main() would see."""
    result = CliRunner().invoke(app, [str(w) for w in words], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fails(capsys, *words):
    """The sentence of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_tasks.base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tagged(base, tmp_path_factory):
    """(a run on CoNLL files, resumed once; its validation file)."""
    folder = tmp_path_factory.mktemp("tag")
    train = tiny_tasks.write_conll(folder / "train.txt", tiny_tasks.sentences(96))
    valid = tiny_tasks.write_conll(folder / "valid.txt", tiny_tasks.sentences(24, seed=1))
    words = ["finetune", train, "--validation", valid, "--model", base, "--task", "tag", "--quiet"]
    words += ["--max-length", 48, "--lr", "3e-3", "--batch-size", 16, "--threads", 1]
    first = command(*words, "--out", folder / "run", "--backend", "torch", "--device", "cpu")
    again = command("finetune", "--out", folder / "run", "--resume", "--quiet", "--lr", "3e-3")
    assert first.stdout.splitlines()[1:] == again.stdout.splitlines()[1:]
    assert first.stdout.splitlines()[1].startswith("validation   loss 0.")
    return folder / "run", valid


def test_help_reads_well():
    text = command("finetune", "--help").output
    for name in ("--task", "--patience", "--max-length", "--resume", "sources"):
        assert name in text
    assert "--file" in command("predict", "--help").output


def test_files_of_predictions_agree(tagged, tmp_path):
    run, valid = tagged
    result = command("predict", run, "--file", valid)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.stderr.startswith("accuracy ")
    expected = json.loads((run / "result.json").read_text())["validation"]
    assert f"f1 {expected['f1']:.4f}" in result.stderr
    for name in ("a.jsonl", "a.csv", "a.conll"):
        command("predict", run, "--file", valid, "--out", tmp_path / name)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == lines
    table = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert [json.loads(row["tags"]) for row in table] == [line["tags"] for line in lines]
    records = read_records(tmp_path / "a.conll", conll=True)
    assert [r.values["tags"] for r in records] == [line["tags"] for line in lines]


def test_lines_of_text(tagged):
    (line,) = command("predict", tagged[0], stdin="The man saw Anna Smith.\n").stdout.splitlines()
    assert json.loads(line)["words"] == ["The", "man", "saw", "Anna", "Smith", "."]


def test_words_that_conll_cannot_hold(tagged, tmp_path, capsys):
    """They are written so that they are read back, or nothing is written."""
    rows = [{"tokens": ["New York", "met"]}, {"tokens": ["a\nb", "-DOCSTART-"]}]
    good = tiny_tasks.write_jsonl(tmp_path / "good.jsonl", rows[:1])
    command("predict", tagged[0], "--file", good, "--out", tmp_path / "good.conll")
    (record,) = read_records(tmp_path / "good.conll", conll=True)
    assert record.values["tokens"] == rows[0]["tokens"]
    bad = tiny_tasks.write_jsonl(tmp_path / "bad.jsonl", rows)
    out = tmp_path / "bad.conll"
    sentence = r"can't hold the word 'a\nb' of sentence 2 with the tag"
    assert sentence in fails(capsys, "predict", tagged[0], "--file", bad, "--out", out)
    assert not out.exists()
    for name in ("bad.jsonl", "bad.csv"):
        command("predict", tagged[0], "--file", bad, "--out", tmp_path / "out" / name)
    with open(tmp_path / "out" / "bad.csv", newline="") as file:
        assert [json.loads(row["words"]) for row in csv.DictReader(file)] == [
            r["tokens"] for r in rows
        ]


def test_pairs_from_a_table(base, tmp_path):
    rows = ["text,other,label"] + [f"{r['text']},a film,{r['label']}" for r in tiny_tasks.texts(40)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    words = ["--pair", "other", "--task", "classify", "--model", base, "--out", tmp_path / "run"]
    words += ["--steps", 2, "--max-length", 32, "--threads", 1, "--device", "cpu"]
    result = command("finetune", tmp_path / "pairs.csv", *words)
    assert "36 train, 4 validation examples, 2 labels" in result.stderr
    (line,) = command(
        "predict", tmp_path / "run", "the man", "--pair", "a film"
    ).stdout.splitlines()
    found = json.loads(line)
    assert (found["text"], found["pair"]) == ("the man", "a film")
    assert found["probability"] == max(found["probabilities"].values())
    assert sum(found["probabilities"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["x", "--out", "a.npy"], "--out a.npy ends in '.npy': choose one of .jsonl, .csv, .conll"),
        (["x", "--file", "y"], "texts and --file are both given"),
        (["\u200b"], "text 1 is '\\u200b', which has no word: leave it out"),
        (["a\udc80"], "half a surrogate pair at character 1"),
        (["x", "--context", "y"], "contexts belong to questions"),
        (["--file", "/nowhere/y.csv"], "/nowhere/y.csv does not exist"),
        (["x", "--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_predict_refuses(tagged, words, sentence, capsys):
    assert sentence in fails(capsys, "predict", tagged[0], *words)


def test_predict_wants_a_head(base, tmp_path, capsys):
    assert "takes one with a head for classification" in fails(capsys, "predict", base, "x")
    assert "there is no" in fails(capsys, "predict", tmp_path / "none", "x")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none.csv", "--task", "classify"], "none.csv does not exist"),
        (["bad.csv", "--task", "classify"], "bad.csv:2 has 1 fields and the heading 2"),
        (["bad.csv", "--task", "rank"], "task is 'rank': choose one of classify, tag, answer"),
        (["bad.csv"], "task is not said"),
        (["--task", "tag"], "sources is empty"),
        (["bad.csv", "--task", "tag", "--resume"], "holds no run to resume"),
    ],
)
def test_finetune_refuses(base, tmp_path, monkeypatch, words, sentence, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("text,label\nx\n")
    words = [*words, "--model", base, "--max-length", 32, "--out", "run", "--quiet"]
    assert sentence in fails(capsys, "finetune", *words)
    assert not (tmp_path / "run" / "config.toml").exists()
