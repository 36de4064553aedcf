"""`import fastbert`, help and refused flags import no torch; the modules of version 0.1 are at their old names."""

import importlib
import os
import subprocess
import sys

import pytest

import fastbert
from fastbert._lazy import MOVED

# runs a command; its last line is the exit code, and whether torch was imported
COMMAND = """
import sys
from fastbert.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(f"\\n{stop.code or 0} {'torch' in sys.modules}")
"""
CLASSIFY = ["--task", "classify", "--model", "bert"]
PRETRAIN = ["pretrain", "a.txt", "--steps", 1]
FINETUNE = ["finetune", "a.csv", *CLASSIFY]


def python(code, *words, **options):
    """(standard output, standard error) of a process that must end with exit code 0."""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    return done.stdout, done.stderr


def test_import_needs_no_torch():
    code = (
        "import sys, fastbert; fastbert.__version__; dir(fastbert); print('torch' in sys.modules)"
    )
    assert python(code)[0] == "False\n"


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["pretrain", "--help"], ["finetune", "--help"]],
    ids=" ".join,
)
def test_help_needs_no_torch(words):
    assert python(COMMAND, *words)[0].splitlines()[-1] == "0 False"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pretrain", "a.txt", "--steps", 1, "--lrr", 3], "--lrr"),
        (["pretrain", "a.txt", "--steps", 1, "--lr", -1], "lr is -1.0: it must be above 0"),
        (["finetune", "a.csv", "--backend", "tpu"], "backend is 'tpu': choose one"),
        (["pretrain", "a.txt"], "how long to train is not said"),
        (["pretrain", "a.txt", "--config", "typo.toml"], "no setting 'stepps': did you mean"),
        (["pretrain", "--resume"], "holds no run to resume"),
        (["pretrain", "a.txt", "--steps", 1, "--heads", 7], "not divisible by num_attention_heads"),
        (["pretrain", "b.txt", "--steps", 1], "b.txt does not exist: name a text file, a folder"),
        ([*PRETRAIN, "--tokenizer", "none"], "none does not exist: name a tokenizer's folder"),
        ([*PRETRAIN, "--init-from", "none"], "there is no directory none: pass one with a config"),
        ([*PRETRAIN, "--data-dir", "a.txt"], "a.txt is a file: name a folder for the tokenised"),
        (["finetune", "a.csv", "--model", "bert"], "task is not said: choose classify, tag"),
        (["finetune", "b.csv", *CLASSIFY], "b.csv does not exist: name a file of labelled data"),
        ([*FINETUNE, "--validation", "b.csv"], "b.csv does not exist: name a file of labelled"),
        ([*FINETUNE, "--test", "b.csv"], "b.csv does not exist: name a file of labelled data"),
        ([*FINETUNE, "--model", "none"], "there is no directory none: pass one with a config.json"),
        (["predict", "none", "x"], "there is no directory none: pass one with a config.json"),
        (["predict", "bert", "--file", "b.csv"], "b.csv does not exist: name a file of labelled"),
        (["fill-mask", "none", "x"], "there is no directory none: pass one with a config.json"),
        (["embed", "a.txt", "x"], "a.txt is a file: pass the directory that holds it"),
        (["embed", "bert", "--file", "b.txt"], "b.txt does not exist: name a text file with one"),
        (["quantize", "none", "out"], "there is no directory none: pass one with a config.json"),
        (["quantize", "bert", "out", "--bits", 4], "--bits 4: choose 12 or 8"),
        (["quantize", "bert", "a.txt"], "a.txt is a file: name a new folder"),
        (["quantize", "bert", "a.txt/b"], "a.txt is a file: name a new folder"),
        (["tune", "--model", "none"], "there is no directory none: pass one with a config.json"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_is_refused_needs_no_torch(tmp_path, words, sentence):
    (tmp_path / "typo.toml").write_text("stepps = 1\n")
    (tmp_path / "a.txt").write_text("A text.\n")
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    words = [*words, "--out", "run"] if words[0] in ("pretrain", "finetune") else words
    output, error = python(COMMAND, *words, cwd=tmp_path)
    assert output.splitlines()[-1] == "2 False"
    # typer draws a box around its sentences
    assert sentence in " ".join(error.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_a_backend_that_there_is_not_needs_no_torch():
    variables = os.environ | {"FASTBERT_BACKEND": "tpu"}
    output, error = python(COMMAND, "info", env=variables)
    assert output.splitlines()[-1] == "2 False"
    assert error.startswith("error: FASTBERT_BACKEND is 'tpu': choose one of cpu, triton")


@pytest.mark.parametrize("old", MOVED)
def test_moved_modules_are_the_new_ones(old):
    assert importlib.import_module(old) is importlib.import_module(MOVED[old])


def test_modules_below_a_moved_package_are_the_new_ones():
    from fastbert.backend.stock import layer_norm

    assert importlib.import_module("fastbert.stock.layer_norm") is layer_norm


def test_a_module_does_not_take_the_place_of_its_function():
    """`fastbert.freeze` and `fastbert.tune` are functions, and old names of modules."""
    code = """
import sys
import fastbert.freeze, fastbert.tune
for name in ("freeze", "tune"):
    verb = getattr(fastbert, name)
    assert callable(verb)
    assert getattr(sys.modules[f"fastbert.{name}"], name) is verb
"""
    python(code)


def test_an_old_module_runs_as_a_script():
    command = [sys.executable, "-m", "fastbert.train.demo", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "Pretrain a small BERT" in run.stdout


def test_dir_lists_what_is_imported_later():
    assert set(fastbert.__all__) <= set(dir(fastbert))
    assert "TrainingRunner" in dir(fastbert.nn)
