"""Two real processes: the losses of one process under DDP and FSDP, resuming, and the end of a process."""

import json
import os
import signal
import subprocess
import sys

import pytest
import ranks
import tiny_run
import tiny_tasks

from fastbert.bert import BertForMaskedLM
from fastbert.distil import DistilConfig, distil
from fastbert.train import PretrainConfig, pretrain
from fastbert.train.metrics import read_metrics
from fastbert.train.session import _divided
from fastbert.train.world import World


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


def settings(corpus, **given):
    """Settings without dropout, whose masks differ between processes, and with a fixed number of sequences a batch."""
    common = {"dropout": 0.0, "max_tokens": None, "batch_size": 4, "shards": 2}
    return tiny_run.tiny_settings(corpus, **common | given)


def losses(out):
    """{(step, kind): loss} of every line."""
    lines = read_metrics(out / "metrics.jsonl")
    return {(m["step"], m["kind"]): m.get("loss", m.get("mlm_loss")) for m in lines}


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    """The losses of one process with both parts of the data."""
    out = tmp_path_factory.mktemp("one") / "run"
    pretrain(PretrainConfig(**settings(corpus)), out, quiet=True)
    found = losses(out)
    assert len(found) == 12 + 3
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(corpus, expected, tmp_path, strategy):
    """Batches differ in their number of labels, so that a mean of the processes' means would be another number."""
    out = tmp_path / "run"
    given = settings(corpus, strategy=strategy)
    codes, errors = ranks.run(2, ranks.train, given, out, errors=tmp_path / "errors")
    assert (codes, errors) == ([0, 0], {})
    assert losses(out) == pytest.approx(expected, rel=1e-5)
    assert len(set(losses(out).values())) == 15
    names = {p.name for p in out.iterdir()}
    assert {"model", "result.json", "loss.png", "config.toml", "about.json"} <= names
    # one process that evaluates the model finds the loss of the two that trained it
    again = settings(corpus, steps=1, lr=1e-12, init_from=str(out / "model"), shards=1)
    one = pretrain(PretrainConfig(**again), tmp_path / "one", quiet=True)
    assert one.evaluation["mlm_loss"] == pytest.approx(expected[12, "eval"], rel=1e-4)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
@pytest.mark.parametrize("optimiser", ["lamb", "muon"])
def test_an_optimiser_of_whole_tensors(corpus, tmp_path, strategy, optimiser):
    """FSDP2 gives a process rows of each weight, also none of them.

    LAMB's norms are sums over the processes, Muon gathers matrices.
    """
    given = settings(corpus, strategy=strategy, optimiser=optimiser, lr=0.02, checkpoint_every=0)
    codes, errors = ranks.run(2, ranks.train, given, tmp_path / "two", errors=tmp_path / "errors")
    assert (codes, errors) == ([0, 0], {})
    pretrain(PretrainConfig(**given), tmp_path / "one", quiet=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_doubled_batch_on_one_process(corpus, expected, tmp_path):
    """Without parts the examples are the same until the first epoch ends; there a run with parts leaves some out."""
    given = settings(corpus, batch_size=8, shards=1, eval_every=0)
    pretrain(PretrainConfig(**given), tmp_path / "whole", quiet=True)
    found = losses(tmp_path / "whole")
    first = [(step, "train") for step in range(1, 11)]
    assert [found[k] for k in first] == pytest.approx([expected[k] for k in first], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "optimiser"),
    [
        ("ddp", "adamw"),
        pytest.param("fsdp", "adamw", marks=pytest.mark.slow),
        pytest.param("fsdp", "muon", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_on_one_then_on_two(corpus, expected, tmp_path, strategy, optimiser):
    """Process 1 is killed, which ends process 0. One process goes on and is killed too. Two processes finish.

    These begin with the evaluation of step 10, which is in no checkpoint.
    """
    out, errors = tmp_path / "run", tmp_path / "errors"
    given = settings(corpus, strategy=strategy, optimiser=optimiser, checkpoint_every=1)
    if optimiser == "muon":
        pretrain(PretrainConfig(**given | {"checkpoint_every": 0}), tmp_path / "one", quiet=True)
        expected = losses(tmp_path / "one")
    codes, found = ranks.run(2, ranks.train, given, out, False, (1, 5), errors=errors)
    assert codes == [2, -signal.SIGKILL]
    assert found[0].startswith("PeerLost: another process of this training has ended")
    codes, _ = ranks.run(1, ranks.train, given, out, True, (0, 10), errors=errors)
    assert codes == [-signal.SIGKILL]
    codes, found = ranks.run(2, ranks.train, given, out, True, errors=errors)
    assert (codes, found) == ([0, 0], {})
    assert losses(out) == pytest.approx(expected, rel=1e-5)
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["step-00000011", "step-00000012"]


def test_one_failure_ends_all(corpus, tmp_path):
    arguments = (settings(corpus), tmp_path / "run", False, None, (1, 2))
    codes, found = ranks.run(2, ranks.train, *arguments, errors=tmp_path / "errors")
    assert codes == [2, 2]
    assert found[1] == "ValueError: this process can't read its data"
    assert found[0].startswith("PeerLost: ")


def test_bad_settings_end_all_before_anything_is_written(corpus, tmp_path):
    arguments = (settings(corpus, heads=5), tmp_path / "run")
    codes, found = ranks.run(2, ranks.train, *arguments, errors=tmp_path / "errors")
    assert codes == [2, 2]
    assert all("not divisible by num_attention_heads 5" in text for text in found.values())
    assert not (tmp_path / "run").exists()


def test_gradients_are_exchanged_once_a_step(tmp_path):
    found = {}
    for accumulate in (1, 4):
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        arguments = (ranks.count_exchanges, folder, accumulate)
        codes, _ = ranks.run(2, *arguments, errors=tmp_path / "errors")
        assert codes == [0, 0]
        found[accumulate] = [json.loads((folder / f"{r}.json").read_text()) for r in (0, 1)]
        assert found[accumulate][0] == found[accumulate][1]
    assert found[1][0][0] == found[4][0][0] == 3
    assert found[1][0][1] != found[4][0][1]


def test_parts_and_processes_must_fit():
    config = PretrainConfig(steps=1)
    assert _divided(config, World(1, 2), False)[1] == World(1, 2, 2)
    world = _divided(PretrainConfig(steps=1, shards=6), World(1, 2), True)[1]
    assert list(world.parts) == [1, 3, 5]
    # a run of one process by a version without the setting `shards`
    assert _divided(config, World(), True)[0].shards == 1
    with pytest.raises(ValueError, match="has 2 parts and there are 3 processes"):
        _divided(PretrainConfig(steps=1, shards=2), World(0, 3), True)


@pytest.mark.slow
def test_torchrun(corpus, tmp_path):
    """The command of docs/scaling.md gives one report and one log. Where OUT holds a run it is refused."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "fastbert", "pretrain", str(corpus), "--out", str(tmp_path / "run")]
    for name, value in settings(corpus).items():
        if name != "sources" and value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=variables, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 steps in") == 1
    assert done.stderr.count("step 12/12") == 1
    again = subprocess.run(words, capture_output=True, text=True, env=variables, timeout=600)
    assert again.returncode != 0
    assert "already holds a run: go on with --resume" in again.stderr


def test_a_distillation_on_two_processes_has_the_losses_of_one(tmp_path):
    """Every kind of data is compared in tests/distil, which takes longer."""
    teacher = tiny_tasks.base_model(tmp_path / "teacher")
    BertForMaskedLM.from_pretrained(teacher).save_pretrained(teacher)
    source = tmp_path / "text"
    source.mkdir()
    for number in range(8):
        rows = tiny_tasks.texts(20, seed=number)
        (source / f"{number}.txt").write_text("\n".join(f"{row['text']}." for row in rows))
    given = {"teacher": str(teacher), "sources": [str(source)], "student": "1x32", "steps": 3}
    given |= {"max_length": 32, "batch_size": 8, "dropout": 0.0, "attention_dropout": 0.0}
    given |= {"shards": 2, "threads": 1, "backend": "torch", "device": "cpu", "log_every": 1}
    codes, errors = ranks.run(2, _distil, given, tmp_path / "two", errors=tmp_path / "errors")
    assert (codes, errors) == ([0, 0], {})
    _distil(given, tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def _distil(given, out):
    distil(DistilConfig(**given), out, quiet=True)
