"""Bytes and products of both backends' GPU kernels, counted on the PTX machine (tests/ptx), for gpu_report.py.

A row is one direction of an op on one backend: distinct bytes of memory against the least, bytes of requests against
whole sectors, passes of shared memory against those without conflicts, products of tensor cores against the necessary
ones, and the times of a roofline model, which are not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks import ROOT
from benchmarks.ops.opbench import cost_of, pair
from fastbert import functional
from fastbert.backend import chooser
from fastbert.backend.reference.samples import Draw

sys.path.insert(0, str(ROOT / "tests"))
from ptx import host
from ptx.memory import SECTOR

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# tokens of a call and the multiprocessors that share them: a ninth of 16,384 and of an A100's 108, since persistent
# programs move more bytes the more of them there are
TOKENS, MULTIPROCESSORS = 1820, 12
MATRIX = ("attention", "qkv_proj")
# bytes and dense multiply-adds a second by the data sheets: A100 80 GB SXM, H100 SXM; fp32 runs as TF32
MODELS = {
    "A100": {"bytes": 2.039e12, "bf16": 156e12, "fp32": 78e12},
    "H100": {"bytes": 3.35e12, "bf16": 494.7e12, "fp32": 247.4e12},
}


def cases(dtype: torch.dtype, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(op, arguments) of the memory-bound ops and of those with products, at BERT-base's widths."""
    draw, C = Draw(dtype), 768
    weight, bias = draw.normal(C), draw.normal(C)
    drop = {"p": 0.1, "seed": draw.seed()}
    yield "layer_norm", {"x": draw.normal(tokens, C), "weight": weight, "bias": bias}
    inputs = {"x": draw.normal(tokens, C), "residual": draw.normal(tokens, C)}
    yield "dropout_add_layer_norm", {**inputs, "weight": weight, "bias": bias, **drop}
    yield "bias_gelu", {"x": draw.normal(tokens // 4, 4 * C), "bias": draw.normal(4 * C)}
    # a small vocabulary, so that nearly every row of its gradient is written
    V, P = 120, 128
    tables = {"word": draw.normal(V, C), "position": draw.normal(P, C), "type_": draw.normal(2, C)}
    ids = {n: draw.ids(m, tokens) for n, m in (("ids", V), ("positions", P), ("types", 2))}
    yield "embed", {**ids, **tables, "weight": weight, "bias": bias, **drop}
    rows = tokens // 64
    yield "cross_entropy", {"logits": draw.normal(rows, 30528), "labels": draw.ids(30528, rows)}
    for S in (128, 256):
        lengths = {"max_seqlen": S, "cu_seqlens": draw.cu_seqlens(*[S] * (256 // S))}
        yield f"attention S{S}", {"qkv": draw.normal(256, 3, 2, 64), **lengths, **drop}
    weights = {"weights": [draw.normal(3 * C, C) * 0.03], "biases": [draw.normal(3 * C)]}
    yield "qkv_proj", {"x": draw.normal(128, C), **weights, "num_heads": 12}


def counted(tokens: int) -> list[dict[str, Any]]:
    """A row for every case, direction, dtype and backend."""
    rows = []
    with mock.patch.object(host, "MULTIPROCESSORS", MULTIPROCESSORS):
        for dtype, torch_dtype in DTYPES.items():
            for name, arguments in cases(torch_dtype, tokens):
                for whose in ("triton", "cuda"):
                    rows += _directions(whose, name, dtype, arguments)
    return rows


def _directions(
    whose: str, name: str, dtype: str, arguments: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    slug = name.split()[0]
    cost = cost_of(slug, arguments)
    forward, backward = pair(getattr(functional, slug), arguments)
    with chooser.use(whose), host.on_machine(whose) as launches:
        y = forward()
        split = len(launches)
        backward(y)
    steps: tuple[tuple[str, list[host.Launch], int, int], ...] = (
        ("forward", launches[:split], cost.forward_bytes, cost.forward_flops),
        ("backward", launches[split:], cost.backward_bytes, cost.backward_flops),
    )
    for direction, part, least, flops in steps:
        # products of the library do not run on the machine
        if slug == "qkv_proj" and (direction == "backward" or not part):
            continue
        row = {"op": name, "direction": direction, "dtype": dtype, "backend": whose}
        yield row | _sums(part, slug, least, flops, dtype)


def _sums(part: list[host.Launch], slug: str, least: int, flops: int, dtype: str) -> dict[str, Any]:
    def total(of: Callable[[Any], float]) -> float:
        return sum(of(launch.counts) for launch in part)

    moved = total(lambda c: sum(read + written for read, written in c.distinct.values()))
    macs, needed = total(lambda c: c.macs), flops // 2 if slug in MATRIX else 0
    bounds = {gpu: 1e6 * max(least / of["bytes"], needed / of[dtype]) for gpu, of in MODELS.items()}
    return {
        "kernels": [launch.kernel for launch in part],
        "moved": moved,
        "least": least,
        "ratio": moved / least,
        "coalescing": total(lambda c: sum(c.asked.values()))
        / max(1, SECTOR * total(lambda c: sum(c.sectors.values()))),
        "conflicts": total(lambda c: c.shared_wavefronts)
        / max(1, total(lambda c: c.shared_accesses)),
        "macs": macs,
        "needed": needed,
        "instructions": total(lambda c: sum(c.instructions.values())),
        "microseconds": bounds,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the page: the two backends side by side."""
    lines = [
        "| op | direction | dtype | backend | kernels | bytes / least | asked / sectors | shared passes "
        "| MACs / needed | warp instr. | A100, H100 at least (model) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        macs = f"{r['macs'] / r['needed']:.2f}" if r["needed"] and r["macs"] else ""
        bounds = ", ".join(f"{us:.2f}" for us in r["microseconds"].values())
        lines.append(
            f"| `{r['op']}` | {r['direction']} | {r['dtype']} | {r['backend']} | {len(r['kernels'])} | "
            f"{r['ratio']:.3f} | {r['coalescing']:.2f} | {r['conflicts']:.2f} | {macs} | "
            f"{r['instructions']} | {bounds} us |"
        )
    return lines
