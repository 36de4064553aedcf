"""Interleaved timing and the facts about a machine."""

import json

import pytest

from fastbert.machine import machine_info
from fastbert.testing.timing import Timing, interleave


def test_every_call_runs_in_every_round_in_turn():
    calls = []
    timings = interleave({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=4, warmup=1)
    assert len(calls) == 15
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 15, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert {r[0] for r in rounds} == {"a", "b", "c"}
    assert all(t.rounds == 4 and 0 < t.p20 <= t.median <= t.p80 for t in timings.values())


def test_percentiles():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Timing(3.5, 2.0, 5.0, 6)


def test_slower_is_slower():
    import time

    timings = interleave({"slow": lambda: time.sleep(0.003), "fast": lambda: None}, rounds=5)
    assert timings["slow"].p20 > timings["fast"].p80


def test_nothing_to_time():
    with pytest.raises(ValueError, match="nothing can be timed"):
        interleave({})


def test_machine_info_is_json_and_names_the_machine():
    facts = machine_info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["versions"]["torch"].startswith("2.")
