"""The driver of the end-to-end benchmark: rounds, and workers that fail, hang or wait."""

import importlib
import os
import re
import sys
import time
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.peers.driver import Handle, Limits, Race, WorkerError

FAKE = """
import json, os, sys, time
mode = sys.argv[1]
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if mode == f"crash-{do}":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)
    if mode == f"hang-{do}":
        time.sleep(60)
    if mode == f"fail-{do}":
        answer = {"error": "this CPU can't"}
    else:
        with open(os.environ["CALLS"], "a") as calls:
            calls.write(f"{mode} {do} {request.get('batch')}\\n")
        seconds = 9.0 if mode == "slow" else 0.25
        answer = {
            "load": {"versions": {"python": "3"}},
            "check": {"loss": 1.0},
            "once": {"seconds": seconds},
            "time": {"seconds": seconds},
            "memory": {"seconds": seconds, "before": 1, "peak": 3},
        }[do]
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def race(tmp_path):
    """A race of fake workers; a worker's name selects its failure. `asked` lists (worker, action, batch)."""
    (tmp_path / "fake.py").write_text(FAKE)
    started = []

    def start(name):
        if name == "absent":
            raise WorkerError("not installed")
        env = {**os.environ, "CALLS": str(tmp_path / "calls")}
        command = [sys.executable, str(tmp_path / "fake.py"), name]
        started.append(Handle(command, tmp_path / f"{name}.log", env))
        return started[-1]

    made = Race(start, {}, batches=3, rounds=4, memory=True, limits=Limits(5, 5))
    made.started = started
    made.asked = lambda: [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    yield made
    for handle in started:
        assert handle.process.returncode is not None, "a worker was left running"


def test_rounds_are_interleaved_and_rotate(race):
    outcomes = race.run(["a", "b"])
    assert all(o.samples == [0.25] * 4 and not o.reason for o in outcomes.values())
    assert outcomes["a"].memory == {"before": 1, "peak": 3}
    assert outcomes["a"].versions == {"python": "3"}
    # each worker warms up three shapes; then the order rotates
    warm = [["load", "None"], ["check", "None"], *(["once", n] for n in "012"), ["memory", "0"]]
    assert race.asked()[:12] == [[name, *action] for name in "ab" for action in warm]
    timed = race.asked()[12:]
    assert [name for name, _, _ in timed] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [batch for _, _, batch in timed[::2]] == ["0", "1", "2", "0"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent", "not installed"),
        ("fail-load", "this CPU can't"),
        ("crash-check", r"the process ended \(exit status 3\): out of luck"),
        ("crash-time", r"the process ended \(exit status 3\): out of luck"),
        ("hang-load", "no answer to 'load' within 3 s"),
        ("hang-memory", "no answer to 'memory' within 3 s"),
        ("slow", r"left out: a call took 9\.0 s, the limit is 1 s"),
    ],
)
def test_what_fails_is_left_out_with_its_reason(race, name, reason):
    race.limits, race.rounds = Limits(3, 1), 1
    outcomes = race.run(["good", name])
    assert re.fullmatch(reason, outcomes[name].reason)
    assert outcomes["good"].samples == [0.25]
    assert not outcomes["good"].reason


def test_who_is_too_slow_is_asked_for_single_calls_only(race):
    race.limits, race.calls, race.memory = Limits(3, 1), 10, False
    assert race.run(["slow"])["slow"].memory is None
    assert [action for _, *action in race.asked()[2:]] == [["once", n] for n in "0120"]


def test_a_counted_call_follows_one_that_is_not(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    made = importlib.import_module("worker").Worker("fastbert")
    clock, calls = [0.0], []

    def call(batch):
        clock[0] += 1.0 if calls else 60.0
        calls.append(batch)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    made.call = call
    for count in (1, 3):
        calls.clear()
        assert made.time(batch=1, calls=count) == {"seconds": 1.0}
        assert calls == [1] * (1 + count)
    calls.clear()
    # one call only: a second one would not show the memory of the first
    assert made.memory(batch=0)["seconds"] == 60.0
    assert calls == [0]


def test_a_waiting_worker_is_stopped(race):
    handle = race.start("a")
    handle.ask(5, "load")
    state = Path(f"/proc/{handle.process.pid}/stat")
    deadline = time.monotonic() + 2
    while state.read_text().rsplit(") ")[-1][0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    handle.ask(5, "load")
    handle.close()


def test_an_interruption_ends_all_workers(race):
    def interrupt(text):
        if text.startswith("  b"):
            raise KeyboardInterrupt

    race.say = interrupt
    with pytest.raises(KeyboardInterrupt):
        race.run(["a", "b"])
    assert len(race.started) == 2
