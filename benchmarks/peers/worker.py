"""One peer in a process of its own: `python worker.py PEER`, JSON lines in on stdin, JSON lines out on stdout.

{"do": "load", ...} builds the model and answers with versions; "check" writes the last hidden state, or tells the
loss without dropout; "once" is one call; "time" times calls after one that is not counted; "memory" tells what a call
needs. Whatever goes wrong is answered as {"error": sentence}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from models import PEERS, Call, Job, Step, Unsupported


def array(output: Any) -> np.ndarray:
    """A peer's output as fp32 NumPy."""
    if hasattr(output, "detach"):
        output = output.detach().float().numpy()
    return np.array(output, dtype=np.float32)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's and those of the packages that are there."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def resident() -> dict[str, int]:
    """VmRSS and VmHWM of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return {k: int(v) * 1024 for k, v in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.M)}


def settled() -> int:
    """Bytes resident now, from where the peak (VmHWM) is counted anew."""
    gc.collect()
    # freed memory that malloc has kept would hide a part of what comes next
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()["VmRSS"]


class Worker:
    """Answers the driver's requests."""

    call: Call

    def __init__(self, peer: str) -> None:
        self.peer = peer

    def load(self, **job: Any) -> dict[str, Any]:
        """Build the peer for a job."""
        job["folder"], job["inputs"] = Path(job["folder"]), Path(job["inputs"])
        if "torch" in versions(["torch"]):
            import torch

            torch.set_num_threads(job["threads"])
        self.call = PEERS[self.peer](Job(**job))
        names = ("torch", "transformers", "numpy", "onnx", self.peer.split("-")[0])
        found = versions(names)
        if self.peer.startswith("fastbert"):
            import fastbert

            # of the checkout, which is not an installed distribution
            found |= {"fastbert": fastbert.__version__, "native": fastbert.backend.cpu.native.isa()}
        return {"versions": found}

    def check(self, file: str) -> dict[str, Any]:
        """What the driver compares: a loss, or the last hidden state of the first batch in a file."""
        if isinstance(self.call, Step):
            return {"loss": self.call.loss()}
        np.save(file, array(self.call(0)))
        return {"file": file}

    def once(self, batch: int) -> dict[str, float]:
        """Seconds of one call."""
        started = time.perf_counter()
        self.call(batch)
        return {"seconds": time.perf_counter() - started}

    def time(self, batch: int, calls: int) -> dict[str, float]:
        """Seconds per call, after one that finds cold caches and pages gone: the process was stopped until now."""
        self.call(batch)
        return {"seconds": sum(self.once(batch)["seconds"] for _ in range(calls)) / calls}

    def memory(self, batch: int) -> dict[str, Any]:
        """Seconds of one call, and the bytes resident before it and at its peak."""
        before = settled()
        seconds = self.once(batch)["seconds"]
        return {"seconds": seconds, "before": before, "peak": resident()["VmHWM"]}


def main() -> None:
    """Serve until stdin ends."""
    # PR_SET_PDEATHSIG = 1: the system ends this process with its driver
    ctypes.CDLL(None).prctl(1, 9)
    # libraries print; stdout is for answers only
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    actions = {name: getattr(worker, name) for name in ("load", "check", "once", "time", "memory")}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request.pop("do")](**request)
        except Exception as error:
            traceback.print_exc()
            plain = isinstance(error, Unsupported)
            first = str(error).strip().splitlines() or ["no message"]
            answer = {"error": str(error) if plain else f"{type(error).__name__}: {first[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
