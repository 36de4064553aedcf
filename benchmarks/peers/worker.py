"""One peer in its own process: `python worker.py PEER`, JSON lines in on stdin, JSON lines out on stdout.

{"do": "load", ...} builds the model and answers with versions; "check" writes a batch's last hidden state, or
returns the loss without dropout; "once" times a call; "time" times calls after one that is not counted; "memory"
measures a call's memory. The answer to a failed request is {"error": sentence}.
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
    """The versions of Python and of those packages that are installed."""
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
    """Reset the peak (VmHWM); returns the resident bytes."""
    gc.collect()
    # a call that uses freed memory which malloc has kept would look smaller
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

            # the checkout's version, since it is not an installed distribution
            found |= {"fastbert": fastbert.__version__, "native": fastbert.backend.cpu.native.isa()}
        return {"versions": found}

    def check(self, file: str, batch: int = 0) -> dict[str, Any]:
        """The result that the driver compares: a loss, or a file with the last hidden state of a batch."""
        if isinstance(self.call, Step):
            return {"loss": self.call.loss()}
        np.save(file, array(self.call(batch)))
        return {"file": file}

    def once(self, batch: int) -> dict[str, float]:
        """Seconds of one call."""
        started = time.perf_counter()
        self.call(batch)
        return {"seconds": time.perf_counter() - started}

    def time(self, batch: int, calls: int) -> dict[str, float]:
        """Seconds per call, after one that is not counted: the process was stopped, so caches and pages are cold."""
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
    # answers alone go to stdout; libraries print to stderr
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
