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

import rivals
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
# embed's share of these: interpreted, its backward takes minutes
SLOW = 4
# calls of ours (fastbert.testing.launches) that public kernels know too
SHARED_CALLS = {
    call.format(direction)
    for call in ("layer_norm {} C768", "cross_entropy {} V30522", "attention {} S512 D64 p0.0")
    for direction in ("fwd", "bwd")
}
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
                    yield inspected(label, kernel)


def inspected(label: str, kernel: Any) -> dict[str, Any]:
    """A row: what a compiled kernel of fastbert.testing.aot is made of."""
    from fastbert.testing import aot

    return {
        "call": label,
        "kernel": kernel.name,
        "arch": kernel.arch,
        "dtype": kernel.dtype,
        "constants": {k: v for k, v in kernel.constants.items() if k.isupper()},
        "warps": kernel.warps,
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "shared": kernel.shared,
        "occupancy": None if isinstance(kernel.arch, str) else kernel.occupancy,
        "matrix": kernel.count(aot.MATRIX),
        "wide": kernel.count(aot.WIDE),
        "global": kernel.count(GLOBAL),
        "shared_accesses": kernel.count(SHARED),
        "instructions": sum(kernel.opcodes.values()),
    }


def side_by_side() -> Iterator[dict[str, Any]]:
    """Rows of ours and of public kernels (rivals.py) for the same bf16 calls, on sm_80 and sm_90."""
    from fastbert.testing import aot
    from fastbert.testing.launches import calls

    ours = [
        (label, call) for label, call in calls(torch.bfloat16, full=True) if label in SHARED_CALLS
    ]
    for arch in (80, 90):
        for label, call in ours:
            for kernel in aot.compiled(arch, call, "bf16"):
                yield {"whose": "fastbert", **inspected(label, kernel)}
        for slug, arguments in rival_cases():
            for name, (call, given) in rivals.of(slug, arguments).items():
                forward, backward = pair(call, given)
                kept: list[Any] = []
                steps = {"fwd": lambda f=forward, k=kept: k.append(f())}
                if name not in rivals.FORWARD_ONLY:
                    steps["bwd"] = lambda b=backward, k=kept: b(k[0])
                for direction, step in steps.items():
                    for kernel in aot.compiled(arch, step, "bf16"):
                        yield {"whose": name, **inspected(f"{slug} {direction}", kernel)}


def rival_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """(op, arguments) on a CPU: launches only compile."""
    draw, C = Draw(torch.bfloat16), 768
    norm = {"weight": draw.normal(C), "bias": draw.normal(C)}
    yield "layer_norm", {"x": draw.normal(64, C), **norm}
    yield "cross_entropy", {"logits": draw.normal(16, 30522), "labels": draw.ids(30522, 16)}
    yield "attention", {"qkv": draw.normal(512, 3, 12, 64), "max_seqlen": 512}


def cases(dtype: torch.dtype, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(op, arguments) of the memory-bound ops, and attention, at BERT-base's widths."""
    draw, C = Draw(dtype), 768
    weight, bias = draw.normal(C), draw.normal(C)
    drop = {"p": 0.1, "seed": draw.seed()}
    yield "layer_norm", {"x": draw.normal(tokens, C), "weight": weight, "bias": bias}
    inputs = {"x": draw.normal(tokens, C), "residual": draw.normal(tokens, C)}
    yield "dropout_add_layer_norm", {**inputs, "weight": weight, "bias": bias, **drop}
    yield "bias_gelu", {"x": draw.normal(tokens // 4, 4 * C), "bias": draw.normal(4 * C)}
    # a vocabulary so small that nearly every row of its gradient is written
    V, P = 120, 128
    tables = {"word": draw.normal(V, C), "position": draw.normal(P, C), "type_": draw.normal(2, C)}
    few = tokens // SLOW
    ids = {n: draw.ids(m, few) for n, m in (("ids", V), ("positions", P), ("types", 2))}
    yield "embed", {**ids, **tables, "weight": weight, "bias": bias, **drop}
    whole = {"max_seqlen": 128, "cu_seqlens": draw.cu_seqlens(128, 128)}
    yield "attention", {"qkv": draw.normal(256, 3, 4, 64), **whole, **drop}
    rows = tokens // 64
    yield "cross_entropy", {"logits": draw.normal(rows, 30528), "labels": draw.ids(30528, rows)}


def traffic(tokens: int) -> list[dict[str, Any]]:
    """Bytes that each direction moves, and the least that it must; in a process that interprets."""
    from unittest import mock

    from fastbert.kernels import _launch
    from fastbert.testing.traffic import counted

    rows = []
    with mock.patch.object(_launch, "multiprocessors") as multiprocessors:
        for name, dtype in DTYPES.items():
            for slug, arguments in cases(dtype, tokens):
                share = SLOW if slug == "embed" else 1
                multiprocessors.return_value = MULTIPROCESSORS // share
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
    if any(r["op"] == "embed" for r in report["traffic"]):
        lines += [
            "",
            "embed's backward also leaves the gradient of every token's sum in fp32, which each table's sum reads;",
            f"torch's sorts of the ids are not counted; it has a {SLOW}th of the tokens. Attention has",
            "dropout, 4 heads and two sequences of 128.",
        ]
    lines += [
        "",
        "## Beside public kernels",
        "",
        "bf16, as compiled: liger-kernel's layer_norm (768 wide) and cross_entropy (30522), and the attention of the",
        "Triton tutorial (512 tokens, heads of 64, no dropout), which reads dense heads. flash-mlm needs a GPU.",
        "",
        "| arch | whose | kernel | call | warps | reg | spill | shared | fits | matrix | 16 B | shared acc. | instr. |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += compared(report["side_by_side"])
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


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table of ours beside public kernels."""
    rows = sorted(rows, key=lambda r: (r["arch"], r["call"].split()[:2]))
    return [
        f"| {r['arch']} | {r['whose']} | `{r['kernel']}` | {r['call']} | {r['warps']} | {r['registers']} | "
        f"{r['spilled']} | {r['shared']} | {r['occupancy']:.0%} | {r['matrix']} | {r['wide']}/{r['global']} | "
        f"{r['shared_accesses']} | {r['instructions']} |"
        for r in rows
    ]


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
        "side_by_side": list(side_by_side()),
        "compiled": list(compiled(options.full)),
    }
    write_text(JSON, json.dumps(report, indent=1) + "\n")
    write_text(PAGE, page(report))


if __name__ == "__main__":
    main()
