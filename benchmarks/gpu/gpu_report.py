"""Facts of GPU kernels that need no GPU: writes results/gpu_static.json and docs/gpu_report.md.

Registers, spills, shared memory, occupancy and instructions of every Triton kernel as compiled; the bytes and
multiply-adds of both backends' kernels against the minimum, counted on the PTX machine (traffic.py). No times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.gpu import kernel_peers, traffic
from benchmarks.ops.opbench import pair
from benchmarks.report.readme import filled
from fastbert.backend.reference.samples import Draw
from fastbert.files import write_text
from fastbert.machine import machine_info

JSON, PAGE = RESULTS / "gpu_static.json", ROOT / "docs" / "gpu_report.md"
# calls of ours (fastbert.testing.launches) that public kernels can compute too
SHARED_CALLS = {
    call.format(direction)
    for call in ("layer_norm {} C768", "cross_entropy {} V30522", "attention {} S512 D64 p0.0")
    for direction in ("fwd", "bwd")
}
GLOBAL = r"(LDG|STG)\b.*|(global|buffer)_(load|store)_.*"
SHARED = r"(LDS|STS|LDSM)\b.*|ds_(read|write)_.*"
COUNTED = """\
Compiled for sm_80 and executed on the PTX machine at {tokens} tokens of BERT-base's width on {multiprocessors}
multiprocessors, which stands for 16380 tokens on an A100's 108 (attention: 256 tokens of 2 heads; qkv_proj: 128;
cross_entropy: a 64th of the rows). *Bytes* are the distinct ones that a kernel reads and writes, summed over all
kernels. *Asked / sectors*: bytes that requests ask for, over bytes of the sectors of 32 that they touch. *Shared
passes*: 1 without bank conflicts. *MACs*: those of tensor cores over those that the op needs; fp32 takes three or four
TF32 products for one, and tiles are multiplied whole. *At least*: a roofline of the makers' bandwidth and peak for the
op's least bytes and products, which is a model and not a time. torch's own kernels (the sorts of embed's backward, the
library's GEMMs) are not counted."""
PUBLIC = """\
bf16, as compiled: liger-kernel's layer_norm (768 wide) and cross_entropy (30522), and the attention of the Triton
tutorial (512 tokens, heads of 64, no dropout), which reads dense heads. flash-mlm needs a GPU."""
COMPILED = """\
Registers of a thread, bytes spilled, bytes of shared memory (LDS), share of a multiprocessor's threads that fit
(NVIDIA), matrix instructions, global accesses of 16 bytes / all, shared-memory accesses, instructions."""


def compiled(full: bool) -> Iterator[dict[str, Any]]:
    """A row for every kernel, configuration, dtype and architecture."""
    from fastbert.testing import aot
    from fastbert.testing.launches import calls

    for arch in aot.ARCHS:
        for dtype, torch_dtype in traffic.DTYPES.items():
            for label, call in calls(torch_dtype, full):
                for kernel in aot.compiled(arch, call, dtype):
                    yield inspected(label, kernel)


def inspected(label: str, kernel: Any) -> dict[str, Any]:
    """A row: the resources and instructions of a compiled kernel of fastbert.testing.aot."""
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
    """Rows of ours and of public kernels (kernel_peers.py) for the same bf16 calls, on sm_80 and sm_90."""
    from fastbert.testing import aot
    from fastbert.testing.launches import calls

    ours = [
        (label, call) for label, call in calls(torch.bfloat16, full=True) if label in SHARED_CALLS
    ]
    for arch in (80, 90):
        for label, call in ours:
            for kernel in aot.compiled(arch, call, "bf16"):
                yield {"whose": "fastbert", **inspected(label, kernel)}
        for slug, arguments in peer_cases():
            for name, (call, given) in kernel_peers.of(slug, arguments).items():
                forward, backward = pair(call, given)
                kept: list[Any] = []
                steps = {"fwd": lambda f=forward, k=kept: k.append(f())}
                if name not in kernel_peers.FORWARD_ONLY:
                    steps["bwd"] = lambda b=backward, k=kept: b(k[0])
                for direction, step in steps.items():
                    for kernel in aot.compiled(arch, step, "bf16"):
                        yield {"whose": name, **inspected(f"{slug} {direction}", kernel)}


def peer_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """(op, arguments) on a CPU, since launches only compile."""
    draw, C = Draw(torch.bfloat16), 768
    norm = {"weight": draw.normal(C), "bias": draw.normal(C)}
    yield "layer_norm", {"x": draw.normal(64, C), **norm}
    yield "cross_entropy", {"logits": draw.normal(16, 30522), "labels": draw.ids(30522, 16)}
    yield "attention", {"qkv": draw.normal(512, 3, 12, 64), "max_seqlen": 512}


def page(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        "# The GPU kernels without a GPU",
        "",
        "This page has compiled code and counted bytes, without times (gpu.md has them). `make gpu-report` writes it.",
        f"{report['machine']['date']}, Triton {report['machine']['versions']['triton']}.",
        "",
        "## Bytes and products, of the least possible",
        "",
        filled(COUNTED.format(tokens=report["tokens"], multiprocessors=traffic.MULTIPROCESSORS)),
        "",
        *traffic.table(report["traffic"]),
    ]
    lines += [
        "",
        "## Beside public kernels",
        "",
        filled(PUBLIC),
        "",
        "| arch | whose | kernel | call | warps | reg | spill | shared | fits | matrix | 16 B | shared acc. | instr. |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += compared(report["side_by_side"])
    lines += [
        "",
        "## As compiled",
        "",
        filled(COMPILED),
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
    """Lines of the table of our kernels beside public ones."""
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
    parser.add_argument(
        "--tokens", type=int, default=traffic.TOKENS, help="tokens of the counted calls"
    )
    options = parser.parse_args()
    report = {
        "machine": machine_info(),
        "tokens": options.tokens,
        "traffic": traffic.counted(options.tokens),
        "side_by_side": list(side_by_side()),
        "compiled": list(compiled(options.full)),
    }
    write_text(JSON, json.dumps(report, indent=1) + "\n")
    write_text(PAGE, page(report))


if __name__ == "__main__":
    main()
