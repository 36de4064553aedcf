"""What can be said of GPU kernels without a GPU: writes results/gpu_static.json and docs/gpu_report.md.

Registers, spills, shared memory, occupancy and instructions of every Triton kernel as compiled; bytes moved against the
minimum, counted in Triton's interpreter by a second process. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from opbench import cost_of, pair

from fastbert import backend, functional
from fastbert.files import write_text
from fastbert.testing.machine import machine_info
from fastbert.testing.samples import Draw

ROOT = Path(__file__).resolve().parents[1]
JSON, PAGE = ROOT / "benchmarks" / "results" / "gpu_static.json", ROOT / "docs" / "gpu_report.md"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# tokens of the calls whose bytes are counted, and the multiprocessors that share them: a ninth of an A100's 108 with a
# ninth of the tokens, since what programs add to the bytes grows with their number
TOKENS, MULTIPROCESSORS = 1820, 12
GLOBAL = r"(LDG|STG)\b.*|(global|buffer)_(load|store)_.*"
SHARED = r"(LDS|STS|LDSM)\b.*|ds_(read|write)_.*"


def compiled(full: bool) -> Iterator[dict[str, Any]]:
    """A row for every kernel, configuration, dtype and architecture."""
    from fastbert.testing import aot
    from fastbert.testing.launches import calls

    for arch in aot.ARCHS:
        for dtype, torch_dtype in DTYPES.items():
            for label, call in calls(torch_dtype, full):
                for kernel in aot.compiled(arch, call, dtype):
                    yield {
                        "call": label,
                        "kernel": kernel.name,
                        "arch": arch,
                        "dtype": dtype,
                        "constants": {k: v for k, v in kernel.constants.items() if k.isupper()},
                        "warps": kernel.warps,
                        "registers": kernel.registers,
                        "spilled": kernel.spilled,
                        "shared": kernel.shared,
                        "occupancy": None if isinstance(arch, str) else kernel.occupancy,
                        "matrix": kernel.count(aot.MATRIX),
                        "wide": kernel.count(aot.WIDE),
                        "global": kernel.count(GLOBAL),
                        "shared_accesses": kernel.count(SHARED),
                        "instructions": sum(kernel.opcodes.values()),
                    }


def cases(dtype: torch.dtype, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(op, arguments) of the memory-bound ops at BERT-base's widths."""
    draw, C = Draw(dtype), 768
    weight, bias = draw.normal(C), draw.normal(C)
    drop = {"p": 0.1, "seed": draw.seed()}
    yield "layer_norm", {"x": draw.normal(tokens, C), "weight": weight, "bias": bias}
    inputs = {"x": draw.normal(tokens, C), "residual": draw.normal(tokens, C)}
    yield "dropout_add_layer_norm", {**inputs, "weight": weight, "bias": bias, **drop}
    yield "bias_gelu", {"x": draw.normal(tokens // 4, 4 * C), "bias": draw.normal(4 * C)}
    rows = tokens // 64
    yield "cross_entropy", {"logits": draw.normal(rows, 30528), "labels": draw.ids(30528, rows)}


def traffic(tokens: int) -> list[dict[str, Any]]:
    """Bytes that each direction moves, and the least that it must; in a process that interprets."""
    from unittest import mock

    from fastbert.kernels import _launch
    from fastbert.testing.traffic import counted

    rows = []
    with mock.patch.object(_launch, "multiprocessors", return_value=MULTIPROCESSORS):
        for name, dtype in DTYPES.items():
            for slug, arguments in cases(dtype, tokens):
                cost = cost_of(slug, arguments)
                forward, backward = pair(getattr(functional, slug), arguments)
                with backend.use("triton"), counted() as launches:
                    y = forward()
                    split = len(launches)
                    backward(y)
                for direction, part, least in (
                    ("forward", launches[:split], cost.forward_bytes),
                    ("backward", launches[split:], cost.backward_bytes),
                ):
                    moved = sum(launch.moved for launch in part)
                    rows.append(
                        {
                            "op": slug,
                            "direction": direction,
                            "dtype": name,
                            "moved": moved,
                            "least": least,
                            "ratio": moved / least,
                        }
                    )
    return rows


def counted_elsewhere(tokens: int) -> list[dict[str, Any]]:
    """`traffic` by a process that interprets: Triton decides that when it is imported."""
    command = [sys.executable, __file__, "--traffic", "--tokens", str(tokens)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def page(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        "# The GPU kernels without a GPU",
        "",
        "Written by `make gpu-report`: compiled code and counted bytes, no time (that is in gpu.md).",
        f"{report['machine']['date']}, Triton {report['machine']['versions']['triton']}.",
        "",
        "## Bytes moved, of the least possible",
        "",
        f"Counted at {report['tokens']} tokens of BERT-base's width on {MULTIPROCESSORS} multiprocessors, as 16380 on",
        "an A100's 108; what programs of one launch share counts once.",
        "",
        "| op | direction | dtype | MB moved | ratio |",
        "|---|---|---|---|---|",
    ]
    for r in report["traffic"]:
        lines.append(
            f"| `{r['op']}` | {r['direction']} | {r['dtype']} | {r['moved'] / 1e6:.1f} | {r['ratio']:.3f} |"
        )
    lines += [
        "",
        "## As compiled",
        "",
        "Registers of a thread, bytes spilled, bytes of shared memory (LDS), share of a multiprocessor's threads that",
        "fit (NVIDIA), matrix instructions, global accesses of 16 bytes of all, shared-memory accesses, instructions.",
        "",
        "| arch | kernel | call | dtype | tile, warps | reg | spill | shared | fits | matrix | 16 B | shared acc. "
        "| instr. |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["compiled"]:
        tile = "x".join(
            str(v) for k, v in r["constants"].items() if k.startswith(("BLOCK", "ROWS"))
        )
        fits = "" if r["occupancy"] is None else f"{r['occupancy']:.0%}"
        lines.append(
            f"| {r['arch']} | `{r['kernel']}` | {r['call']} | {r['dtype']} | {tile}, {r['warps']} | {r['registers']} | "
            f"{r['spilled']} | {r['shared']} | {fits} | {r['matrix']} | {r['wide']}/{r['global']} | "
            f"{r['shared_accesses']} | {r['instructions']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every configuration, not one a kernel")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the calls that are counted")
    parser.add_argument("--traffic", action="store_true", help="print the counts as JSON")
    options = parser.parse_args()
    if options.traffic:
        print(json.dumps(traffic(options.tokens)))
        return
    report = {
        "machine": machine_info(),
        "tokens": options.tokens,
        "traffic": counted_elsewhere(options.tokens),
        "compiled": list(compiled(options.full)),
    }
    write_text(JSON, json.dumps(report, indent=1) + "\n")
    write_text(PAGE, page(report))


if __name__ == "__main__":
    main()
