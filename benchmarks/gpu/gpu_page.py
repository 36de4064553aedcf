"""Writes docs/gpu.md and the README's table of GPUs from benchmarks/results/gpu.json, which `make gpu` writes."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.report.readme import filled, replaced

GPU_JSON = RESULTS / "gpu.json"
BEGIN, END = "<!-- table: python -m benchmarks.gpu.gpu_page -->", "<!-- end of that table -->"
OURS = ("fastbert", "fastbert, graph")
PEERS = ("liger", "tutorial", "flash-mlm", "flash-attn")

Row = dict[str, Any]


def works(report: dict[str, Any]) -> list[str]:
    """The table of whole steps: medians, and the better of ours against the best of stock."""
    names = sorted({n for row in report["models"] for n in row["milliseconds"]}, key=_ours_first)
    lines = [
        f"| BERT-base, bf16 | {' | '.join(names)} | speed-up |",
        "|---" * (len(names) + 2) + "|",
    ]
    for row in report["models"]:
        times = {n: t[0] for n, t in row["milliseconds"].items()}
        ours = min(times[n] for n in OURS if n in times)
        best, whose = min((t, n) for n, t in times.items() if n not in OURS)
        cells = [f"{times[n]:.1f} ms" if n in times else "" for n in names]
        lines.append(f"| {row['work']} | {' | '.join(cells)} | {best / ours:.2f}x of {whose} |")
    return lines


def _ours_first(name: str) -> tuple[bool, str]:
    return name not in OURS, name


def ops(report: dict[str, Any]) -> list[str]:
    """The table of ops and directions: microseconds on the device, from cold caches."""
    rows = report["ops"]["rows"]
    names = [
        n for n in ("triton", "cuda", "compiled eager", "sdpa", *PEERS, "torch") if _timed(rows, n)
    ]
    lines = [
        f"| op | | {' | '.join(names)} | of copy bandwidth | of matrix peak |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in rows:
        options = ", ".join(f"{k} {v}" for k, v in row["options"].items())
        times = row["microseconds"]
        cells = [f"{times[n]:.0f}" if n in times else "" for n in names]
        shares = (row["percent_of_bandwidth"], row["percent_of_matrix_peak"])
        cells += [f"{share:.0f} %" for share in shares]
        lines.append(f"| {row['op']} {options} | {row['direction']} | {' | '.join(cells)} |")
    return lines


def _timed(rows: list[Row], name: str) -> bool:
    return any(name in row["microseconds"] for row in rows)


def facts(report: dict[str, Any]) -> str:
    """The device, date and versions, in a sentence."""
    machine = report["machine"]
    v = machine["versions"]
    return (
        f"{machine['date']}, {machine['gpus'][0]}, torch {v['torch']}, triton {v['triton']}, "
        f"transformers {v['transformers']}."
    )


def page(report: dict[str, Any]) -> str:
    """docs/gpu.md."""
    peaks = report["ops"]["peaks"]
    notes = [filled(f"- {note}") for note in report.get("notes", [])]
    lines = [
        "# On a GPU",
        "",
        "This page has the measurements of kernels and whole steps on a GPU.",
        "Written by `python -m benchmarks.gpu.gpu_page` from `benchmarks/results/gpu.json`, which `make gpu` writes.",
        "",
        facts(report),
        "",
        *notes,
        "",
        "## Whole steps",
        "",
        filled(
            "Pretraining (MLM + NSP, dropout 0.1) without the optimiser's step, and the encoder's inference, under "
            "bf16 autocast; wall-clock medians of interleaved rounds. `eager`, `sdpa` and `compiled` are "
            "transformers' model; `compiled, graph` is torch.compile's mode reduce-overhead; `fastbert, graph` are "
            "the runners of [modules.md](modules.md). The last column is the ratio of the best other time that was "
            "measured to the better of ours."
        ),
        "",
        *(works(report) if "models" in report else ["Not measured."]),
        "",
        "## Ops",
        "",
        filled(
            "bf16, 16,384 tokens, 768 wide; microseconds on the device, medians. `compiled eager` is the op in plain "
            "PyTorch under torch.compile; `torch` is fastbert's backend of stock ops, which replays dropout by plain "
            f"tensor ops. The shares are triton's, of {peaks['copy_gb_per_s']:.0f} GB/s and "
            f"{peaks['bf16_tflops']:.0f} TFLOP/s, measured in the same run."
        ),
        "",
        *ops(report),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite both pages."""
    report = json.loads(GPU_JSON.read_text())
    (ROOT / "docs" / "gpu.md").write_text(page(report))
    readme = ROOT / "README.md"
    table = "\n".join(
        [*works(report), "", f"{facts(report)} Every op: [docs/gpu.md](docs/gpu.md)."]
    )
    readme.write_text(replaced(readme.read_text(), table, BEGIN, END))


if __name__ == "__main__":
    main()
