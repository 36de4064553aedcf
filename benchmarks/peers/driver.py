"""Runs workers side by side: one process per peer, one call each per round, one active at a time."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer; the message is the reason as a sentence."""


class Handle:
    """A worker process; `ask` sends a request and returns the answer, or raises the reason why there is none.

    Between requests the process is stopped (SIGSTOP), so that its waiting threads take no time from other workers.
    """

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str]) -> None:
        self.log = log
        with open(log, "wb") as errors:
            # in its own session: Ctrl-C reaches the driver only, and close() ends the worker's helpers too
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                start_new_session=True,
            )

    def ask(self, timeout: float, do: str, **request: Any) -> dict[str, Any]:
        """The worker's answer; raises WorkerError."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerError(self._end()) from None
        answer = json.loads(self._line(timeout, do))
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """Kill the worker and its helpers; it has nothing to save."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                continue

    def _line(self, timeout: float, do: str) -> bytes:
        assert self.process.stdout is not None
        handle = self.process.stdout.fileno()
        deadline, line = time.monotonic() + timeout, b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise WorkerError(f"no answer to {do!r} within {timeout:g} s")
            block = os.read(handle, 1 << 16)
            if not block:
                raise WorkerError(self._end())
            line += block
        return line

    def _end(self) -> str:
        code = self.process.wait()
        how = (
            f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        )
        last = self.log.read_text(errors="replace").strip().splitlines() or ["nothing in its log"]
        return f"the process ended ({how}): {last[-1][:200]}"

    def _signal(self, number: int) -> None:
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return


@dataclass
class Limits:
    """Time limits in seconds."""

    load: float = 600
    # a peer whose calls take longer than this is left out
    call: float = 60


@dataclass
class Outcome:
    """One peer's samples in seconds per call, or the reason why there are none."""

    samples: list[float] = field(default_factory=list)
    check: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Any] | None = None
    reason: str = ""


@dataclass
class Race:
    """Peers at one work; `start` starts a worker by its name or raises WorkerError."""

    start: Callable[[str], Handle]
    job: dict[str, Any]
    batches: int = 1
    calls: int = 1
    rounds: int = 5
    memory: bool = False
    limits: Limits = field(default_factory=Limits)
    say: Callable[[str], None] = print

    def run(self, names: Sequence[str]) -> dict[str, Outcome]:
        """Load, check, warm up, then interleave; a peer that fails is left out with its reason."""
        outcomes = {name: Outcome() for name in names}
        handles: dict[str, Handle] = {}

        def attempt(name: str, action: Callable[[Handle, Outcome], None]) -> None:
            try:
                if name not in handles:
                    handles[name] = self.start(name)
                action(handles[name], outcomes[name])
            except WorkerError as error:
                outcomes[name].reason = str(error)
                self.say(f"  {name}: {error}")
                if name in handles:
                    handles.pop(name).close()

        try:
            for name in names:
                attempt(name, self._prepare)
            for number in range(self.rounds):
                alive = list(handles)
                # rotated, so that no peer is first in every round
                shift = number % len(alive) if alive else 0
                for name in alive[shift:] + alive[:shift]:
                    attempt(name, lambda h, o, n=number: o.samples.append(self._time(h, n)))
        finally:
            for handle in handles.values():
                handle.close()
        return outcomes

    def _prepare(self, handle: Handle, outcome: Outcome) -> None:
        """Load, compare, warm up with every shape and, on the way, measure the memory; each call is made once.

        So a peer with calls beyond the limit costs only one call more than there are shapes.
        """
        started = time.monotonic()
        outcome.versions = handle.ask(self.limits.load, "load", **self.job)["versions"]
        file = handle.log.with_suffix(".npy")
        outcome.check = handle.ask(self.limits.load, "check", file=str(file))
        # the first call of a shape may compile
        for number in range(self.batches):
            handle.ask(self.limits.load, "once", batch=number)
        answer = handle.ask(self.limits.load, "memory" if self.memory else "once", batch=0)
        seconds = answer.pop("seconds")
        outcome.memory = answer or None
        if seconds > self.limits.call:
            raise WorkerError(
                f"left out: a call took {seconds:.1f} s, the limit is {self.limits.call:g} s"
            )
        self.say(f"  {handle.log.stem}: ready after {time.monotonic() - started:.0f} s")

    def _time(self, handle: Handle, number: int) -> float:
        # the call before the timed ones may take twice as long
        timeout = (2 + self.calls) * self.limits.call
        batch = number % self.batches
        return float(handle.ask(timeout, "time", batch=batch, calls=self.calls)["seconds"])
