"""The command line: real processes where exit codes and streams matter, typer's runner for the rest."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fastbert.backend import cpu
from fastbert.cli.app import app, main
from fastbert.train import PretrainConfig, pretrain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return pretrain(
        PretrainConfig(**tiny_run.tiny_settings(corpus, steps=2)), out, quiet=True
    ).model


@pytest.fixture(scope="module")
def roberta(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("roberta") / "run"
    settings = tiny_run.tiny_settings(corpus, steps=2, recipe="roberta", vocab_size=300)
    return pretrain(PretrainConfig(**settings), out, quiet=True).model


def run(*arguments, stdin=None):
    """The result of a command in this process: exit code 0, else the exception that main() would see."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fails(capsys, *arguments):
    """The sentence of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def flags(settings):
    """Settings as flags."""
    words = []
    for name, value in settings.items():
        if name == "sources":
            words += value
        else:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def spawn(*arguments, **options):
    command = [sys.executable, "-m", "fastbert", *(str(a) for a in arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes | options)


def test_help_reads_well():
    text = run("--help").output
    for name in ("pretrain", "fill-mask", "embed", "info"):
        assert name in text
    text = run("pretrain", "--help").output
    for name in (
        "--mask-prob",
        "--whole-word",
        "--no-whole-word",
        "--resume",
        "--eval-every",
        "sources",
    ):
        assert name in text


def test_version():
    from fastbert import __version__

    assert run("--version").output == f"fastbert {__version__}\n"


def test_info():
    text = run("info").output
    for name in ("native module", "dropout_add_layer_norm", "reference", "missing"):
        assert name in text
    facts = json.loads(run("info", "--json").output)
    assert facts["backends"]["layer_norm"]["torch"] is None
    assert {"cpu", "triton", "cuda"} <= facts["backends"]["layer_norm"].keys()
    assert facts["versions"]["torch"].startswith("2.")


def test_pretrain_from_a_file_and_flags(corpus, tmp_path):
    file = tmp_path / "settings.toml"
    text = PretrainConfig(**tiny_run.tiny_settings(corpus)).to_toml()
    file.write_text(text)
    out = tmp_path / "run"
    result = run(
        "pretrain", "--config", file, "--out", out, "--steps", 3, "--lr", "1e-4", "--quiet"
    )
    assert "3 steps in" in result.output
    assert str(out / "model") in result.output
    assert "steps = 3\n" in (out / "config.toml").read_text()
    assert "lr = 0.0001\n" in (out / "config.toml").read_text()
    again = run("pretrain", "--out", out, "--resume", "--quiet", "--lr", "1e-4")
    assert "3 steps in" in again.output


def test_stopped_process_says_how_to_go_on(corpus, tmp_path):
    """SIGTERM to the process: exit code 143, and one sentence with the command that resumes the run."""
    out = tmp_path / "run"
    settings = tiny_run.tiny_settings(corpus, steps=100_000, checkpoint_every=0, eval_every=0)
    process = spawn("pretrain", *flags(settings), "--out", out)
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    last = error.strip().splitlines()[-1]
    assert last.startswith("stopped by SIGTERM after step ")
    assert last.endswith(f"fastbert pretrain --out {out} --resume")
    # plain lines, since standard error is no terminal here
    assert "step 1/100000  loss " in error
    assert "\x1b" not in error


def test_user_errors_are_one_sentence_in_a_real_process(tmp_path):
    process = spawn("pretrain", tmp_path / "none.txt", "--out", tmp_path / "run", "--steps", 1)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output == ""
    assert (
        error
        == f"error: {tmp_path / 'none.txt'} does not exist: name a text file, a folder, or - for stdin\n"
    )
    process = spawn(
        "pretrain", tmp_path / "none.txt", "--out", tmp_path / "run", "--steps", 1, "--debug"
    )
    assert "Traceback" in process.communicate(timeout=120)[1]


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("FASTBERT_BACKEND", "cpu, triton"),
        ("FASTBERT_CPU_ISA", "instruction set|native module"),
        ("FASTBERT_KEEP_MEMORY", "0 or 1"),
    ],
)
def test_a_variable_that_asks_for_what_is_not_there(name, choices):
    """`info` ends with one sentence, and no op runs on another backend instead; help still works."""
    variables = os.environ | {name: "nonsense"}
    code = """
import torch, fastbert
from fastbert.cli.app import main
try:
    main(["info"])
except SystemExit as stop:
    print(stop.code)
fastbert.functional.bias_gelu(torch.ones(2))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "2\n")
    said, *_, last = done.stderr.splitlines()
    assert re.fullmatch(rf"error: {name} is 'nonsense': [^\n]*({choices})[^\n]*", said)
    assert last.startswith(f"ValueError: {name} is ")
    assert spawn("--help", env=variables).wait(timeout=120) == 0


def test_info_names_the_instruction_set_in_force():
    if cpu.native is None:
        pytest.skip(str(cpu.unavailable))
    output, _ = spawn("info", env=os.environ | {"FASTBERT_CPU_ISA": "baseline"}).communicate()
    assert f"  instruction set        baseline (of {' '.join(cpu.native.isas())})\n" in output


def malformed(folder):
    """Input files that can't be trained on, and a part of the sentence for each."""
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n \n")
    (folder / "latin.txt").write_bytes("Präsident".encode("latin-1"))
    (folder / "zero.txt").write_bytes(b"text\0text")
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "number.jsonl").write_text('{"text": 5}\n')
    (folder / "other.jsonl").write_text('{"body": "fine"}\n')
    (folder / "broken.gz").write_bytes(b"not gzip at all")
    (folder / "bad.toml").write_text("lr = = 1\n")
    (folder / "typo.toml").write_text("stepps = 1\n")
    (folder / "type.toml").write_text('lr = "high"\n')
    (folder / "none").mkdir()
    return [
        (["empty.txt"], "empty.txt is empty"),
        (["blank.txt"], "blank.txt holds no text"),
        (["latin.txt"], "latin.txt is not UTF-8 at byte 2"),
        (["zero.txt"], "zero.txt has a zero byte"),
        (["bad.jsonl"], "bad.jsonl:2 is not JSON"),
        (["number.jsonl"], "field 'text' is int, not a string"),
        (["other.jsonl"], "has no field 'text'"),
        (["broken.gz"], "broken.gz is a broken gzip file"),
        (["none"], "none holds no *.txt"),
        (["missing.txt"], "missing.txt does not exist"),
        (["good.txt", "good.txt"], "good.txt is given twice"),
        (["good.txt"], "at least 2 must be left"),
        (["good.txt", "--config", "bad.toml"], "bad.toml can't be read"),
        (["good.txt", "--config", "typo.toml"], "no setting 'stepps': did you mean 'steps'?"),
        (["good.txt", "--config", "type.toml"], "lr is 'high': it must be a float"),
        (["good.txt", "--config", "gone.toml"], "no configuration file"),
        (["good.txt", "--tokenizer", "good.txt"], "the tokenizer in good.txt can't be used"),
        (["good.txt", "--init-from", "none"], "there is no configuration at"),
        (["good.txt", "--recipe", "elmo"], "recipe is 'elmo'"),
        (["good.txt", "--heads", "7"], "is not divisible by num_attention_heads 7"),
        (["good.txt", "--epochs", "1", "--minutes", "1"], "epochs and minutes are both set"),
        (["good.txt", "--max-tokens", "9", "--batch-size", "9"], "both set"),
        (["good.txt", "--dropout", "1.0"], "dropout is 1.0: it must be in [0, 1)"),
        (["good.txt", "--device", "tpu"], "device 'tpu' can't be used"),
    ]


NUMBER = 24


@pytest.mark.parametrize("number", range(NUMBER))
def test_malformed_input_is_refused_and_leaves_no_run(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("One sentence here. And another one there.\n")
    cases = malformed(tmp_path)
    assert len(cases) == NUMBER
    words, sentence = cases[number]
    if "--epochs" not in words:
        words = [*words, "--steps", "1"]
    small = ["--vocab-size", "60", "--layers", "1", "--hidden", "32", "--max-length", "16"]
    if "--heads" not in words:
        small += ["--heads", "2"]
    before = set(os.listdir(tmp_path))
    assert sentence in fails(capsys, "pretrain", *words, *small, "--out", "run", "--quiet")
    assert set(os.listdir(tmp_path)) - before <= {"run"}
    left = (
        [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
        if (tmp_path / "run").exists()
        else []
    )
    # complete shards may stay: the next attempt uses or replaces them
    assert {p.parent.name for p in left} <= {"data"}
    assert all("unfinished" not in p.name and "part" not in p.name for p in left)


def test_fill_mask(model):
    text = "The [MASK] nation needs the [MASK]."
    (line,) = run("fill-mask", model, text, "--json", "--top", 3).output.splitlines()
    found = json.loads(line)
    assert found["text"] == text
    assert [len(mask) for mask in found["masks"]] == [3, 3]
    for mask in found["masks"]:
        values = [word["probability"] for word in mask]
        assert values == sorted(values, reverse=True)
        assert 0.0 < sum(values) < 1.0
    # OUT of the run is as good as OUT/model
    assert run("fill-mask", model.parent, text, "--json", "--top", 3).output.strip() == line
    table = run("fill-mask", model, text).output
    assert "[MASK] 2" in table
    assert found["masks"][0][0]["word"] in table


def test_fill_mask_agrees_with_transformers(model):
    transformers = pytest.importorskip("transformers")
    text = "The [MASK] nation needs the law."
    theirs = transformers.pipeline("fill-mask", model=str(model), top_k=4)(text)
    found = json.loads(run("fill-mask", model, text, "--json", "--top", 4).output)["masks"][0]
    assert [f["word"] for f in found] == [t["token_str"] for t in theirs]
    assert [f["probability"] for f in found] == pytest.approx(
        [t["score"] for t in theirs], rel=1e-4
    )


def test_fill_mask_takes_lines_and_roberta(roberta):
    lines = run("fill-mask", roberta, "--json", stdin="The [MASK] law.\nThe<mask> law.\n").output
    first, second = (json.loads(line)["masks"] for line in lines.splitlines())
    assert len(first) == len(second) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["no mask here"], "there is no [MASK] in 'no mask here'"),
        (["[MASK]", "--top", "0"], "top is 0"),
        (["[MASK] " * 100], "truncate it"),
        ([" "], "text 1 of the command line is empty"),
    ],
)
def test_fill_mask_refuses(model, words, sentence, capsys):
    assert sentence in fails(capsys, "fill-mask", model, *words)


def test_model_folder_is_checked(tmp_path, capsys):
    assert "there is no directory" in fails(capsys, "fill-mask", tmp_path / "none", "[MASK]")


def test_embed_formats_agree(model, tmp_path):
    texts = ["The law.", "The great union serves the people. " * 3, "Roads and banks."]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    for name in ("a.npy", "a.safetensors", "a.jsonl"):
        run("embed", model, "--file", tmp_path / "texts.txt", "--out", tmp_path / name)
    vectors = np.load(tmp_path / "a.npy")
    assert vectors.shape == (3, 32)
    assert np.array_equal(load_file(tmp_path / "a.safetensors")["embeddings"], vectors)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == texts
    assert np.allclose([line["vector"] for line in lines], vectors)
    # text by text, from arguments: packing with other texts changes nothing
    for text, vector in zip(texts, vectors, strict=True):
        single = json.loads(run("embed", model, text).output)["vector"]
        np.testing.assert_allclose(single, vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embed_agrees_with_transformers(model, pooling):
    import torch

    transformers = pytest.importorskip("transformers")
    texts = ["The law.", "The great union serves the people."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    theirs = transformers.BertModel.from_pretrained(model).eval()
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    output = run("embed", model, *texts, "--pooling", pooling).output
    found = [json.loads(line)["vector"] for line in output.splitlines()]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_embed_cuts_long_texts_and_normalizes(model):
    result = run("embed", model, "law " * 200, "--normalize")
    assert "1 texts were cut to 64 tokens" in result.stderr
    vector = json.loads(result.stdout)["vector"]
    assert np.linalg.norm(vector) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["x", "--out", "a.csv"], "--out a.csv ends in '.csv': choose one of .npy"),
        (["x", "--pooling", "max"], "pooling is 'max': choose mean or cls"),
        (["x", "--batch-size", "0"], "batch_size is 0"),
        (["x", "--file", "y"], "texts and --file are both given"),
        (["--file", "/nowhere/y"], "/nowhere/y"),
    ],
)
def test_embed_refuses(model, words, sentence, capsys):
    assert sentence in fails(capsys, "embed", model, *words)
