"""Options and the store of the op benchmarks: `python -m pytest benchmarks/ops --benchmark-only [--quick]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.ops import opbench

STORE = pytest.StashKey[opbench.Store]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("op benchmarks")
    group.addoption(
        "--quick",
        action="store_true",
        help="only the smallest case of every op, variant and dtype, and no file of results",
    )
    group.addoption("--seconds", type=float, default=1.0, help="time for the rounds of one case")
    group.addoption("--ops-json", type=Path, default=opbench.OPS_JSON, help="file of results")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("quick"):
        return
    smallest: dict[tuple, tuple[int, pytest.Item]] = {}
    for item in items:
        spec = getattr(item, "callspec", None) and item.callspec.params.get("spec")
        if spec:
            name, size = (spec.slug, spec.variant, spec.dtype), spec.T * spec.C
            if name not in smallest or size < smallest[name][0]:
                smallest[name] = size, item
        else:
            smallest[(item.nodeid,)] = 0, item
    kept = {id(item) for _, item in smallest.values()}
    config.hook.pytest_deselected(items=[i for i in items if id(i) not in kept])
    items[:] = [i for i in items if id(i) in kept]


@pytest.fixture(scope="session")
def store(request, tmp_path_factory) -> opbench.Store:
    """The file of the session's results, with the machine's peaks."""
    quick = request.config.getoption("quick")
    path = request.config.getoption("ops_json")
    if quick:
        path = tmp_path_factory.mktemp("quick") / "ops.json"
    made = opbench.new_store(path, 1.0 if quick else 6.0)
    request.config.stash[STORE] = made
    return made


@pytest.fixture
def seconds(request) -> float:
    """The time for the rounds of one case."""
    return 0.05 if request.config.getoption("quick") else request.config.getoption("seconds")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    made = config.stash.get(STORE, None)
    if made is None or not made.new:
        return
    terminalreporter.section("ops: fastbert, eager, compiled; ratio to the better of the two")
    for r in made.new:
        terminalreporter.write_line(opbench.line(r))
    missed = sum(not r["met"] for r in made.new)
    terminalreporter.write_line(f"{len(made.new)} rows, {missed} miss their goal; peaks:")
    terminalreporter.write_line(", ".join(f"{k} {v:.1f}" for k, v in made.peaks.items()))
