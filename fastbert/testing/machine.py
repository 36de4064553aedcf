"""What a measurement was made on: the machine, the versions, the date."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# (m, k, n) of the GEMMs whose best is the peak
_GEMMS = ((512, 768, 3072), (1024, 1024, 1024), (2048, 768, 768))
_PACKAGES = ("triton", "numpy", "tokenizers", "safetensors", "transformers")


def machine_info() -> dict[str, Any]:
    """The CPU, its cores, the GPUs, torch's threads and instruction set, versions and the date, all plain JSON."""
    import fastbert

    versions = {"fastbert": fastbert.__version__, "python": platform.python_version()}
    versions["torch"] = str(torch.__version__)
    for name in _PACKAGES:
        versions[name] = _version(name)
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gb": memory_gb(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def peaks(seconds: float = 6.0) -> dict[str, float]:
    """What this machine can do now with torch's threads, measured within about `seconds`, which percentages refer to.

    {"gflops_fp32", "gflops_bf16", "copy_gb_per_s", "threads"} and, from the native module's instruction set,
    "fma_gflops_fp32" and (AVX-512 BF16) "fma_gflops_bf16": multiply-adds on registers. A GEMM peak is the best of
    torch, oneDNN with prepacked weights and our `linear`, over a few sizes; a copy counts the bytes read and the
    bytes written.
    """
    from fastbert import cpu

    threads = torch.get_num_threads()
    found: dict[str, float] = {"threads": threads}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[f"gflops_{name}"] = _gemm_peak(dtype, 0.4 * seconds)
    # larger than any cache that one process gets
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    best = _best(lambda: target.copy_(source), 0.2 * seconds)
    found["copy_gb_per_s"] = 2 * source.numel() * source.element_size() / best / 1e9
    if cpu.native is not None:
        found["fma_gflops_fp32"] = cpu.native.fma_peak(threads)
        if dot := cpu.native.dot_peak(threads):
            found["fma_gflops_bf16"] = dot
    return found


def _gemm_peak(dtype: torch.dtype, seconds: float) -> float:
    """GFLOP/s of the fastest GEMM at hand."""
    calls = [(2 * m * k * n, call) for m, k, n in _GEMMS for call in _gemms(m, k, n, dtype)]
    return max(flops / _best(call, seconds / len(calls)) for flops, call in calls) / 1e9


def _gemms(m: int, k: int, n: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Calls of x (m, k) times weight (n, k) transposed, one for each library that can."""
    from fastbert import functional

    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    yield lambda: torch.nn.functional.linear(x, weight)
    yield lambda: functional.linear(x, weight)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (RuntimeError, NotImplementedError, AttributeError):
        # this torch has no oneDNN, or it does not know the dtype on this chip
        return
    yield lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _best(call: Callable[[], object], seconds: float) -> float:
    """The shortest of as many calls as fit into `seconds`, at least one."""
    best, end = float("inf"), time.perf_counter() + seconds
    with torch.no_grad():
        while best == float("inf") or time.perf_counter() < end:
            started = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - started)
    return best


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gb() -> float:
    """The machine's memory in GB, rounded to one digit."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
