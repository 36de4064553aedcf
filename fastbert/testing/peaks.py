"""The peaks of this machine, to which percentages in benchmarks refer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from fastbert import functional
from fastbert.backend import cpu

# (m, k, n) of the GEMMs whose best is the peak
_GEMMS = ((512, 768, 3072), (1024, 1024, 1024), (2048, 768, 768))


def peaks(seconds: float = 6.0) -> dict[str, float]:
    """This machine's present peaks with torch's number of threads, measured within about `seconds`.

    {"gflops_fp32", "gflops_bf16", "copy_gb_per_s", "threads"} and, from the native module's instruction set,
    "fma_gflops_fp32" and (AVX-512 BF16) "fma_gflops_bf16": multiply-adds on registers. A GEMM peak is the best of
    torch, oneDNN with prepacked weights and our `linear`, over a few sizes; a copy counts the bytes read and the
    bytes written.
    """
    threads = torch.get_num_threads()
    found: dict[str, float] = {"threads": threads}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[f"gflops_{name}"] = _gemm_peak(dtype, 0.4 * seconds)
    # larger than the caches
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
    """GFLOP/s of the fastest call of _gemms over the sizes _GEMMS."""
    calls = [(2 * m * k * n, call) for m, k, n in _GEMMS for call in _gemms(m, k, n, dtype)]
    return max(flops / _best(call, seconds / len(calls)) for flops, call in calls) / 1e9


def _gemms(m: int, k: int, n: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Calls of x (m, k) times weight (n, k) transposed, one for each library that has one."""
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    yield lambda: torch.nn.functional.linear(x, weight)
    yield lambda: functional.linear(x, weight)
    try:
        prepacked = torch.ops.mkldnn._reorder_linear_weight(weight, m)
        torch.ops.mkldnn._linear_pointwise(x, prepacked, None, "none", [], "")
    except (RuntimeError, NotImplementedError, AttributeError):
        # this torch has no oneDNN, or oneDNN has no kernel of this dtype for this CPU
        return
    yield lambda: torch.ops.mkldnn._linear_pointwise(x, prepacked, None, "none", [], "")


def _best(call: Callable[[], object], seconds: float) -> float:
    """The shortest time of as many calls as fit into `seconds`, at least one."""
    best, end = float("inf"), time.perf_counter() + seconds
    with torch.no_grad():
        while best == float("inf") or time.perf_counter() < end:
            started = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - started)
    return best
