"""Cost against length: `python -m benchmarks.models.scaling [--quick] [--out FOLDER]` writes scaling.json and .png.

One encoder layer of BERT-base over T packed tokens, real lengths and full, beside torch.nn.TransformerEncoderLayer on
the padded batch; and attention alone on one sequence of S tokens, time and peak memory, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import RESULTS, ROOT
from benchmarks.ops.bench_attention import lengths_of
from fastbert import functional
from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.nn.blocks import EncoderLayer
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import interleave_training

C, H, F = 768, 12, 3072
TOKENS = tuple(2**i for i in range(6, 15))
WEIGHTS = ("weight", "bias")
LENGTHS = tuple(2**i for i in range(7, 13))
Pair = tuple[Callable[[], Tensor], Callable[[Tensor], object]]


def pair(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Pair:
    """(forward, backward) for interleave_training."""

    def backward(y: Tensor) -> object:
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return forward, backward


def layers() -> tuple[EncoderLayer, nn.TransformerEncoderLayer]:
    """Ours and torch's with the same weights, in training mode."""
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(C, H, F, 0.1, "gelu", 1e-12, batch_first=True)
    # BERT has no dropout inside the feed-forward
    stock.dropout.p = 0.0
    ours = EncoderLayer(C, H, F)
    state = {"attention.qkv." + k: getattr(stock.self_attn, "in_proj_" + k) for k in WEIGHTS}
    parts = {
        "attention.out": stock.self_attn.out_proj,
        "attention_norm": stock.norm1,
        "feed_forward.up": stock.linear1,
        "feed_forward.down": stock.linear2,
        "output_norm": stock.norm2,
    }
    state |= {f"{name}.{k}": getattr(part, k) for name, part in parts.items() for k in WEIGHTS}
    ours.load_state_dict(state)
    return ours, stock


def layer_case(T: int, fill: str) -> tuple[dict[str, Pair], dict[str, Any]]:
    """Our layer and torch's at T tokens, after they have agreed without dropout, and facts about the batch."""
    ours, stock = layers()
    lengths = lengths_of(T, "full" if fill == "full" else "padded")
    x = torch.randn(T, C).requires_grad_()
    longest = max(lengths)
    token = torch.arange(longest) < torch.tensor(lengths)[:, None]
    padded = nn.utils.rnn.pad_sequence(list(x.detach().split(list(lengths))), batch_first=True)
    padded.requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mask = None if bool(token.all()) else ~token
    seed = torch.randint(2**62, (1,))

    def packed() -> Tensor:
        return ours(x, cu_seqlens, longest, seed)

    def usual() -> Tensor:
        return stock(padded, src_key_padding_mask=mask)

    ours.eval(), stock.eval()
    a, b = packed().detach(), usual().detach()[token]
    assert float((a - b).norm() / b.norm()) < 1e-4, "the layers disagree: not timed"
    ours.train(), stock.train()
    pairs = {
        "fastbert": pair(packed, [x, *ours.parameters()]),
        "torch": pair(usual, [padded, *stock.parameters()]),
    }
    return pairs, {"T": T, "fill": fill, "real": T / token.numel()}


def layer_rows(tokens: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """Seconds of one layer, forward and forward + backward."""
    rows = []
    for fill in ("real", "full"):
        for T in tokens:
            pairs, facts = layer_case(T, fill)
            for forward, backward in pairs.values():
                backward(forward())
            times = interleave_training(pairs, seconds)
            taken = {n: {d: vars(t[d]) for d in ("forward", "both")} for n, t in times.items()}
            rows.append({**facts, "seconds": taken})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def attention_pair(name: str, S: int, p: float) -> Pair:
    """Attention over one sequence of S tokens: ours, SDPA, or written out with matmuls."""
    qkv = torch.randn(S, 3, H, C // H).requires_grad_()
    bounds, seed = torch.tensor([0, S], dtype=torch.int32), torch.randint(2**62, (1,))
    if name == "fastbert":
        options = {"p": p, "seed": seed} if p else {}
        return pair(lambda: functional.attention(qkv, bounds, S, **options), [qkv])

    def sdpa() -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p)

    def written_out() -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3).unbind(0)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return nn.functional.dropout(weights, p) @ v

    return pair(sdpa if name == "sdpa" else written_out, [qkv])


def resident(field: str) -> int:
    """Resident bytes from /proc/self/status: VmRSS now, VmHWM the peak since its last reset."""
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(field + ":"):
            return int(entry.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: memory can't be measured here")


def measure_attention(name: str, S: int, p: float, rounds: int) -> dict[str, Any]:
    """Seconds, and the peak of memory above its level before the call, in this fresh process."""
    forward, backward = attention_pair(name, 64, p)
    # loads libraries and starts threads before memory is counted
    backward(forward())
    forward, backward = attention_pair(name, S, p)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    backward(forward())
    peak = resident("VmHWM") - before
    times = interleave_training({name: (forward, backward)}, 0.0, (rounds, rounds))[name]
    return {"peak_bytes": peak, "seconds": {d: vars(times[d]) for d in ("forward", "both")}}


def attention_rows(lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Measures every implementation at every S, each in its own process."""
    rows = []
    for S in lengths:
        for p in (0.0, 0.1):
            for name in ("fastbert", "sdpa", "written out"):
                command = [sys.executable, "-m", "benchmarks.models.scaling"]
                command += ["--attention", name, str(S), str(p), "--rounds", str(rounds)]
                output = subprocess.run(
                    command, cwd=ROOT, check=True, capture_output=True, text=True
                ).stdout
                row = {"S": S, "p": p, "name": name, **json.loads(output.splitlines()[-1])}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def slope(points: list[tuple[int, float]]) -> float:
    """The exponent of growth between the last two lengths: 1 is linear, 2 quadratic."""
    (a, x), (b, y) = points[-2:]
    return math.log(y / x) / math.log(b / a)


def plot(results: dict[str, Any], path: Path) -> None:
    """Three panels: a layer's time per token, attention's time, attention's memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (layer, duration, memory) = plt.subplots(1, 3, figsize=(16, 4.5))
    for fill, style in (("real", "-"), ("full", "--")):
        for name, colour in (("fastbert", "tab:blue"), ("torch", "tab:red")):
            for direction, mark in (("forward", "o"), ("both", "s")):
                rows = [r for r in results["layer"] if r["fill"] == fill]
                us = [1e6 * r["seconds"][name][direction]["median"] / r["T"] for r in rows]
                label = f"{name}, {'forward' if direction == 'forward' else 'and backward'}, {fill}"
                tokens = [r["T"] for r in rows]
                layer.plot(tokens, us, style, marker=mark, color=colour, label=label, ms=4)
    layer.set(title="one encoder layer", xlabel="real tokens T", ylabel="us per real token")
    for name, colour in (("fastbert", "blue"), ("sdpa", "red"), ("written out", "gray")):
        for p, style in ((0.0, "-"), (0.1, "--")):
            rows = [r for r in results["attention"] if (r["name"], r["p"]) == (name, p)]
            S = [r["S"] for r in rows]
            ms = [1e3 * r["seconds"]["both"]["median"] for r in rows]
            mb = [max(r["peak_bytes"], 1) / 1e6 for r in rows]
            growth = f", ~S^{slope(list(zip(S, mb, strict=True))):.1f}" if len(S) > 1 else ""
            options = {"marker": "o", "ms": 4, "color": f"tab:{colour}"}
            duration.plot(S, ms, style, label=f"{name}, p = {p}", **options)
            memory.plot(S, mb, style, label=f"{name}, p = {p}{growth}", **options)
    duration.set(title="attention, forward + backward", xlabel="S", ylabel="ms")
    memory.set(title="attention, peak memory over its inputs", xlabel="S", ylabel="MB")
    for axes in (layer, duration, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize=7, handlelength=4)
        axes.grid(alpha=0.3)
    m = results["machine"]
    figure.suptitle(f"BERT-base, fp32, {m['cpu']}, {m['threads']} threads, {m['date']}", fontsize=9)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    """Measure, write, plot; with --attention one measurement in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few short lengths, to see it run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--attention", nargs=3, metavar=("NAME", "S", "P"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of an attention measurement")
    options = parser.parse_args()
    if options.attention:
        name, S, p = options.attention
        print(json.dumps(measure_attention(name, int(S), float(p), options.rounds)))
        return 0
    tokens, lengths = (TOKENS[:2], LENGTHS[:2]) if options.quick else (TOKENS, LENGTHS)
    results = {
        "machine": machine_info(),
        "peaks": peaks(1.0 if options.quick else 6.0),
        "layer": layer_rows(tokens, 0.05 if options.quick else 2.0),
        "attention": attention_rows(lengths, options.rounds),
    }
    write_text(options.out / "scaling.json", json.dumps(results, indent=1) + "\n")
    plot(results, options.out / "scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
