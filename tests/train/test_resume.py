"""Runs in their own processes are killed and resumed. Their losses have the bits of an uninterrupted run's."""

import multiprocessing
import random
import signal
import time

import pytest
import tiny_run
from tiny_run import losses

from fastbert.train.metrics import read_metrics

# processes are forked, within milliseconds, from one that has imported torch and computed nothing
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["tiny_run", "fastbert.pretrain.run", "fastbert.models.checkpoint", "torch._dynamo"]
PRELOADED += ["torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg"]
CONTEXT.set_forkserver_preload(PRELOADED)


def start(settings, out, **options):
    process = CONTEXT.Process(target=tiny_run.train, args=(settings, out), kwargs=options)
    process.start()
    return process


def finish(settings, out, **options):
    """Run to the end; returns the exit code, negative for a signal."""
    process = start(settings, out, **options)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return tiny_run.tiny_settings(tiny_run.write_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(settings, out) == 0
    found = losses(out)
    # a line per step, and evaluations after 5, 10 and 12 steps
    assert [line["step"] for line in found if line["kind"] == "train"] == list(range(1, 13))
    assert [line["step"] for line in found if line["kind"] == "eval"] == [5, 10, 12]
    assert len({line["loss"] for line in found if line["kind"] == "train"}) == 12
    return found


def test_same_again_without_interruption(settings, expected, tmp_path):
    assert finish(settings, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == expected


@pytest.mark.parametrize("sabotage", ["half", "unnamed"])
def test_killed_while_a_checkpoint_is_written(settings, expected, tmp_path, sabotage):
    out = tmp_path / "run"
    assert finish(settings, out, sabotage=sabotage) == -signal.SIGKILL
    left = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert [n for n in left if not n.startswith(".")] == ["step-00000004.pt"]
    assert len(left) == 2
    assert read_metrics(out / "metrics.jsonl")[-1]["step"] == 8
    assert finish(settings, out, resume=True) == 0
    assert losses(out) == expected
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["step-00000008.pt", "step-00000012.pt"]


RAMP = {
    "recipe": "modern",
    "tokenizer_kind": "wordpiece",
    "accumulate": 3,
    "batch_ramp": 0.5,
    "max_tokens": 128,
    "schedule": "wsd",
}


@pytest.mark.parametrize("more", [{}, RAMP], ids=["bert", "modern"])
def test_muon_is_killed_and_goes_on(settings, more, tmp_path):
    """The states of both kinds of groups are in a checkpoint; matrices go through the native products where built.

    With the recipe modern a step takes as many batches as the ramp says.
    """
    given = settings | {"optimiser": "muon", "backend": None} | more
    assert finish(given, tmp_path / "whole") == 0
    assert finish(given, tmp_path / "run", sabotage="half") == -signal.SIGKILL
    assert finish(given, tmp_path / "run", resume=True) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def wait_for_step(process, out, step):
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        lines = read_metrics(out / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.001)


def test_killed_at_random_moments(settings, expected, tmp_path):
    """Killed and resumed several times, at random moments from the first steps on."""
    out, draw, kills, resume = tmp_path / "run", random.Random(), 0, False
    settings = settings | {"checkpoint_every": 1}
    for attempt in range(6):
        process = start(settings, out, resume=resume)
        wait_for_step(process, out, 1 + 2 * attempt)
        time.sleep(draw.uniform(0.0, 0.03))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        resume = (out / "config.toml").exists()
    assert kills >= 3
    assert finish(settings, out, resume=resume) == 0
    assert losses(out) == expected


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(settings, expected, tmp_path, signum, code):
    """The run writes a checkpoint of its current step, whatever checkpoint_every is."""
    import os

    out = tmp_path / "run"
    settings = settings | {"checkpoint_every": 0}
    process = start(settings, out)
    wait_for_step(process, out, 2)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == code
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert 2 <= int(checkpoint.stem[5:]) < 12
    assert int(checkpoint.stem[5:]) == read_metrics(out / "metrics.jsonl")[-1]["step"]
    assert finish(settings, out, resume=True) == 0
    assert losses(out) == expected
