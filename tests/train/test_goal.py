"""A run with a goal ends at the first evaluation that reaches it; without reaching it, at its last step."""

import signal

import pytest
import tiny_run

from fastbert.pretrain import run
from fastbert.pretrain.config import load_settings
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.train import PretrainConfig, pretrain
from fastbert.train.loop import Stopped
from fastbert.train.metrics import read_metrics

# every sentence has one form, so that a position determines the kind of its word: learnt in seconds
EASY = {"recipe": "roberta", "tokenizer_kind": "wordpiece", "vocab_size": 200, "dropout": 0.0}
EASY |= {"hidden": 64, "steps": 200}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    corpus = tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))
    return tiny_run.tiny_settings(corpus, **EASY)


@pytest.fixture(scope="module")
def reached(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("reached") / "run"
    return pretrain(PretrainConfig(**settings, goal=0.5), out, quiet=True)


def lines(out):
    """The metrics without their times."""
    timed = ("seconds", "tokens_per_s")
    found = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in timed} for line in found]


def test_the_first_evaluation_at_the_goal_is_the_last(reached):
    assert reached.reached
    assert reached.goal == pytest.approx(reached.baselines["unigram entropy"] - 0.5)
    held_out = [m["mlm_loss_masked"] for m in lines(reached.out) if m["kind"] == "eval"]
    assert held_out[-1] <= reached.goal < min(held_out[:-1])
    assert reached.evaluation["mlm_loss_masked"] == held_out[-1]
    assert reached.steps == 5 * len(held_out) < 200
    assert load_settings(reached.out / "config.toml")["goal"] == 0.5
    text = "\n".join(run.summary(reached))
    assert f"goal at the same places: {reached.goal:.3f} nats, reached" in text


def test_a_goal_changes_no_loss(settings, reached, tmp_path, monkeypatch):
    """Up to its end a run with a goal has the lines of a run without one: the schedule depends on `steps` only."""
    end = reached.steps
    monkeypatch.setattr(run.PretrainRun, "finished", lambda self: self.trainer.at.step == end)
    result = pretrain(PretrainConfig(**settings), tmp_path / "run", quiet=True)
    assert (result.goal, result.reached) == (None, False)
    assert lines(result.out) == lines(reached.out)


def test_the_last_step_comes_before_the_goal(settings, tmp_path, capsys):
    config = PretrainConfig(**settings | {"steps": 7, "goal": 50.0, "log_every": 2})
    result = pretrain(config, tmp_path / "run")
    assert result.steps == 7
    assert not result.reached
    assert "nats, not reached" in "\n".join(run.summary(result))
    shown = capsys.readouterr().err
    goal = result.goal
    first = next(m["mlm_loss_masked"] for m in lines(result.out) if m["kind"] == "eval")
    assert f"tokens/s  until the held-out loss is {goal:.2f}, at most 0:00:0" in shown
    assert f"until the held-out loss is {goal:.2f}, now {first:.2f}, at most 0:00:0" in shown


def test_stopped_and_resumed(settings, reached, tmp_path, monkeypatch):
    """An interruption changes no line. A run that has reached its goal trains no further when it is resumed."""
    out, step = tmp_path / "run", PretrainTrainer.train_step

    def interrupted(self):
        if self.at.step == 7:
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "train_step", interrupted)
        with pytest.raises(Stopped, match="after step 8"):
            pretrain(PretrainConfig(**settings, goal=0.5), out, quiet=True)
    for _ in range(2):
        again = pretrain(None, out, resume=True, quiet=True)
        assert (again.steps, again.goal, again.reached) == (reached.steps, reached.goal, True)
        assert lines(out) == lines(reached.out)
    with pytest.raises(ValueError, match=r"goal is 0\.5 there and 0\.4 here"):
        pretrain(PretrainConfig(**settings, goal=0.4), out, resume=True, quiet=True)
