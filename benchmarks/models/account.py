"""Where a training step's time goes: `python -m benchmarks.models.account [--fill full] [--busy]`.

A masked-LM step of BERT-base with AdamW on a CPU. Every native kernel is timed inside the step. A product's limit is
its arithmetic at the FMA peak. AdamW's limit is its memory traffic at the copy bandwidth. The run measures both rates.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import RESULTS
from benchmarks.models.works import FULL, REAL
from fastbert.backend import cpu
from fastbert.bert import BertConfig, BertForMaskedLM
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.testing.peaks import peaks
from fastbert.train.optim import parameter_groups

# the rows of the table: native entry points by what they compute
PRODUCTS = {
    "products, forward": ("linear_fwd", "feed_forward_up"),
    "products, input gradients": ("linear_bwd_dx", "feed_forward_down_bwd"),
    "products, weight gradients": ("linear_bwd_dw",),
}
KERNELS = {
    **PRODUCTS,
    "bias gradients": ("linear_bwd_db",),
    "attention, forward": ("attention_fwd",),
    "attention, backward": ("attention_bwd",),
    "norms with dropout and residual": ("dropout_add_layer_norm_fwd", "dropout_add_layer_norm_bwd"),
    "GELU, norm and loss of the head": (
        *("bias_gelu_fwd", "bias_gelu_bwd", "layer_norm_fwd", "layer_norm_bwd"),
        *("cross_entropy_fwd", "cross_entropy_bwd", "cross_entropy_inplace"),
    ),
    "embeddings, forward": ("embed_fwd",),
    "embeddings, backward": ("embed_bwd",),
}
PHASES = ("forward", "backward", "AdamW", "zero_grad")


class Clock:
    """Seconds and multiply-adds of the native calls since `reset`, by entry point."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.products: dict[str, float] = defaultdict(float)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time every kernel of KERNELS that is called inside."""
        names = [name for group in KERNELS.values() for name in group]
        before = {name: getattr(cpu.native, name) for name in names}
        for name, kernel in before.items():
            setattr(cpu.native, name, self._timed(name, kernel))
        try:
            yield
        finally:
            for name, kernel in before.items():
                setattr(cpu.native, name, kernel)

    def _timed(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        product = any(name in group for group in PRODUCTS.values())

        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = kernel(*arguments)
            self.seconds[name] += time.perf_counter() - started
            if product:
                # the last arguments of a product: M, N, K, threads
                M, N, K = arguments[-4:-1]
                self.products[name] += M * N * K
            return result

        return call


def step_of(lengths: tuple[int, ...]) -> tuple[list[Callable[[], object]], int]:
    """The phases of a step on a batch of these lengths, and the number of trained numbers."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig()).train()
    ids = torch.randint(1000, 30000, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels = torch.where((torch.rand(ids.shape) < 0.15) & mask, ids, -100)
    groups = [{k: v for k, v in g.items() if k != "names"} for g in parameter_groups(model, 0.01)]
    optimiser = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    loss: list[torch.Tensor] = []

    def forward() -> None:
        loss[:] = [model(ids, attention_mask=mask.long(), labels=labels).loss]

    phases = [forward, lambda: loss[0].backward(), optimiser.step, optimiser.zero_grad]
    return phases, sum(p.numel() for p in model.parameters())


def measure(phases: list[Callable[[], object]], steps: int) -> list[dict[str, float]]:
    """Seconds of each phase and kernel, page faults, and seconds in the operating system, of every step."""
    clock, found = Clock(), []
    with clock.watching():
        for number in range(-2, steps):
            clock.reset()
            before = resource.getrusage(resource.RUSAGE_SELF)
            row = {}
            for name, phase in zip(PHASES, phases, strict=True):
                started, inside = time.perf_counter(), sum(clock.seconds.values())
                phase()
                row[name] = time.perf_counter() - started
                row[f"{name}, outside of kernels"] = row[name] - (
                    sum(clock.seconds.values()) - inside
                )
            after = resource.getrusage(resource.RUSAGE_SELF)
            row["step"] = sum(row[name] for name in PHASES)
            row["system"] = after.ru_stime - before.ru_stime
            row["faults"] = after.ru_minflt - before.ru_minflt
            for group, names in KERNELS.items():
                row[group] = sum(clock.seconds[name] for name in names)
                row[f"{group}, products"] = sum(clock.products[name] for name in names)
            if number >= 0:
                found.append(row)
    return found


def account(fill: str, steps: int) -> dict[str, Any]:
    """The median step: {"step", "system" and each row of the table in seconds, "limits", "peak"}."""
    lengths = FULL if fill == "full" else REAL
    phases, parameters = step_of(lengths)
    before, rows, after = peaks(2.0), measure(phases, steps), peaks(2.0)
    typical = {name: median(row[name] for row in rows) for name in rows[0]}
    peak, copied = (max(before[k], after[k]) for k in ("fma_gflops_fp32", "copy_gb_per_s"))
    limits = {name: 2e-9 * typical[f"{name}, products"] / peak for name in PRODUCTS}
    # AdamW reads p, g, m and v and writes p, m and v
    limits["AdamW"] = 7e-9 * 4 * parameters / copied
    return {
        "fill": fill,
        "steps": steps,
        "seconds": {k: v for k, v in typical.items() if not k.endswith(", products")},
        "limits": limits,
        "peak": (before["fma_gflops_fp32"], after["fma_gflops_fp32"]),
        "copy_gb_per_s": copied,
    }


def table(found: dict[str, Any]) -> str:
    """One result as a Markdown table of milliseconds."""
    seconds, limits = found["seconds"], found["limits"]
    outside = [f"{name}, outside of kernels" for name in ("forward", "backward")]
    rows = [*KERNELS, *outside, "AdamW", "zero_grad"]
    whole = sum(limits.values())
    lines = [
        f"| {found['fill']}{', another process computes' if found['busy'] else ''} | ms | limit | above it |",
        "|---|---|---|---|",
    ]
    for name in rows:
        ms, limit = 1e3 * seconds[name], 1e3 * limits.get(name, 0.0)
        lines.append(f"| {name} | {ms:.0f} | {limit:.0f} | {ms - limit:.0f} |")
    ms = 1e3 * seconds["step"]
    lines.append(f"| the step | {ms:.0f} | {1e3 * whole:.0f} | {ms - 1e3 * whole:.0f} |")
    before, after = found["peak"]
    lines.append(
        f"\n{seconds['faults']:.0f} page faults and {1e3 * seconds['system']:.0f} ms of all threads in the operating "
        f"system a step; FMA peak {before:.0f} GFLOP/s before and {after:.0f} after, copying "
        f"{found['copy_gb_per_s']:.1f} GB/s; medians of {found['steps']} steps"
    )
    return "\n".join(lines)


def _compute() -> None:
    torch.set_num_threads(1)
    x = torch.randn(512, 512)
    while True:
        x @ x


def main() -> int:
    """Measure, print the table, write account.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fill", choices=("real", "full"), default="real", help="41 %% or 100 %% real tokens"
    )
    parser.add_argument(
        "--busy", action="store_true", help="beside a process that computes on one core"
    )
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of account.json")
    options = parser.parse_args()
    other = multiprocessing.get_context("spawn").Process(target=_compute, daemon=True)
    if options.busy:
        other.start()
    try:
        found = {**account(options.fill, options.steps), "busy": options.busy}
    finally:
        if options.busy:
            other.terminate()
    print(table(found))
    path = options.out / "account.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    name = f"{options.fill}{'-busy' if options.busy else ''}"
    kept[name] = {"machine": machine_info(), **found}
    write_text(path, json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
