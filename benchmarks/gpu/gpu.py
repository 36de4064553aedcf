"""`make gpu`: all checks and measurements that need a GPU, in one command; writes benchmarks/results/gpu.json.

Parity tests, memory and race checks where compute-sanitizer is there, every op and whole training and inference steps
against PyTorch eager, compiled and the peers that are installed. `--rehearse` does the same on a CPU with tiny shapes,
where Triton interprets the kernels: its times mean nothing, and the file says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as tnf

from benchmarks import RESULTS, ROOT
from benchmarks.gpu import kernel_peers
from benchmarks.models.works import REAL
from benchmarks.ops.opbench import cost_of, gate, pair, reference_of

GPU_JSON = RESULTS / "gpu.json"
TESTS = ["tests/ops", *(f"tests/gpu/test_{n}.py" for n in ("triton", "triton_tune", "graphs"))]
# small enough for a sanitizer, which slows kernels down a hundredfold
SANITIZED = "(triton or cuda) and bf16 and (S5 or S33 or T7 or N7 or T13)"

# the rehearsal's model, without hidden dropout: TrainingRunner pads the batch to 256 tokens, for which Triton's
# interpreter would spend most of its time on dropout
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
TINY |= {"intermediate_size": 64, "hidden_dropout_prob": 0}

GPU_BACKENDS = ("triton", "cuda", "torch")
PARTS = ("parity", "sanitizer", "ops", "models")

Call = Callable[[], Any]


def run(*command: str, **env: str) -> dict[str, Any]:
    """Run a command; returns it, its exit code and the end of its output."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    return {"command": " ".join(command), "code": done.returncode, "tail": done.stdout[-2000:]}


def parity(rehearsal: bool) -> dict[str, Any]:
    """The tests of every op on the Triton and CUDA backends, and of CUDA graphs; in a rehearsal one op's smallest."""
    tests, picked = TESTS, "triton or cuda or graph or training"
    if rehearsal:
        tests, picked = ["tests/ops/test_layer_norm.py"], "triton and nobias"
    # -m replaces pyproject.toml's, which leaves out more tests; kernels compile in parallel
    at_once = [] if rehearsal else ["-n", str(min(12, os.cpu_count() or 1))]
    command = ["-m", "pytest", "-q", "-m", "not slow", *at_once, "-k", picked, *tests]
    return run(sys.executable, *command)


def sanitized() -> list[dict[str, Any]] | str:
    """The results of compute-sanitizer's memory and race checks, or a sentence why there are none."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not on PATH: it comes with the CUDA toolkit"
    test = (sys.executable, "-m", "pytest", "-q", "-x", "-k", SANITIZED, "tests/ops")
    return [
        run(tool, "--tool", kind, "--error-exitcode", "9", *test)
        for kind in ("memcheck", "racecheck")
    ]


def clocks(device: str) -> str:
    """nvidia-smi's report of the device's clocks and power under load, or a sentence why there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi is not on PATH"
    a = torch.ones(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(500):
        a @ a
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    return run(tool, f"--query-gpu={query}", "--format=csv,noheader")["tail"].strip()


def peaks(device: str, rehearsal: bool) -> dict[str, float]:
    """Measured: GB/s of a copy (read + written), TFLOP/s of a bf16 product."""
    from fastbert.testing.timing import interleave

    n, m = (2**16, 64) if rehearsal else (2**28, 8192)
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    a = torch.randn(m, m, device=device, dtype=torch.bfloat16)
    times = interleave({"copy": lambda: target.copy_(source), "product": lambda: a @ a}, rounds=10)
    return {
        "copy_gb_per_s": 8 * n / times["copy"].median / 1e9,
        "bf16_tflops": 2 * m**3 / times["product"].median / 1e12,
    }


def op_cases(device: str, rehearsal: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(op, arguments) at BERT-base's shapes with 16,384 tokens in bf16; tiny ones in a rehearsal."""
    from fastbert.backend.reference.samples import Draw

    T, C, H, V = (16, 32, 2, 200) if rehearsal else (16384, 768, 12, 30522)
    draw = Draw(torch.bfloat16, device)
    weight, bias, drop = draw.normal(C), draw.normal(C), {"p": 0.1, "seed": draw.seed()}
    x = draw.normal(T, C)
    yield "layer_norm", {"x": x, "weight": weight, "bias": bias}
    norm = {"x": x, "residual": draw.normal(T, C), "weight": weight, "bias": bias}
    yield "dropout_add_layer_norm", {**norm, **drop}
    yield "bias_gelu", {"x": draw.normal(T, 4 * C), "bias": draw.normal(4 * C)}
    tables = {"word": draw.normal(V, C), "position": draw.normal(64, C), "type_": draw.normal(2, C)}
    ids = {"ids": draw.ids(V, T), "positions": draw.ids(64, T), "types": draw.ids(2, T)}
    yield "embed", {**ids, **tables, "weight": weight, "bias": bias, **drop}
    for S in (16,) if rehearsal else (128, 512):
        packed = {
            "qkv": draw.normal(T, 3, H, C // H),
            "cu_seqlens": draw.cu_seqlens(*[S] * (T // S)),
        }
        yield "attention", {**packed, "max_seqlen": S, **drop}
        yield "attention", {**packed, "max_seqlen": S}
    three = [draw.normal(C, C, scale=C**-0.5) for _ in range(3)]
    yield (
        "qkv_proj",
        {"x": x, "weights": three, "biases": [draw.normal(C) for _ in range(3)], "num_heads": H},
    )
    w1, w2 = draw.normal(4 * C, C, scale=C**-0.5), draw.normal(C, 4 * C, scale=C**-0.5)
    yield "feed_forward", {"x": x, "w1": w1, "b1": draw.normal(4 * C), "w2": w2, "b2": bias}
    labels = draw.labels(V, T, 0.15)
    yield (
        "mlm_loss",
        {"hidden": x, "weight": tables["word"], "bias": draw.normal(V), "labels": labels},
    )
    yield "cross_entropy", {"logits": draw.normal(T // 8, V), "labels": draw.ids(V, T // 8)}


def ops(device: str, rehearsal: bool) -> dict[str, Any]:
    """Times every op on each GPU backend, its eager form compiled, and the peers; a wrong kernel is not timed."""
    from fastbert import functional
    from fastbert.backend import chooser
    from fastbert.testing.timing import interleave_training

    rows, measured = [], peaks(device, rehearsal)
    for slug, arguments in op_cases(device, rehearsal):
        op, reference = getattr(functional, slug), reference_of(slug)
        cost = cost_of(slug, arguments)
        pairs: dict[str, tuple[Callable, Callable]] = {}
        for name in GPU_BACKENDS:
            if chooser.matrix()[slug][name] is not None or chooser.device_of(name) is None:
                continue
            with chooser.use(name):
                gate(slug, arguments, cost)
            pairs[name] = pair(_forced(chooser, name, op), arguments)
        if slug == "attention":
            pairs["sdpa"] = pair(_sdpa, arguments)
        elif not rehearsal:
            plain = torch.compile(PLAIN.get(slug, reference.eager), dynamic=False)
            pairs["compiled eager"] = pair(plain, arguments)
        for name, (call, given) in ({} if rehearsal else kernel_peers.of(slug, arguments)).items():
            forward, backward = pair(call, given)
            lacks = name in kernel_peers.FORWARD_ONLY
            pairs[name] = (forward, _nothing) if lacks else (forward, backward)
        # a rehearsal has no peers that can fail, and a call in the interpreter takes seconds
        if not rehearsal:
            _remove_failing(slug, pairs)
        times = interleave_training(pairs, 3.0, (1, 1) if rehearsal else (3, 200))
        for direction, moved, flops in (
            ("forward", cost.forward_bytes, cost.forward_flops),
            ("backward", cost.backward_bytes, cost.backward_flops),
        ):
            seconds = {
                name: t[direction]
                for name, t in times.items()
                if direction == "forward" or name not in kernel_peers.FORWARD_ONLY
            }
            ours = seconds["triton"].median
            rows.append(
                {
                    "op": slug,
                    "options": {
                        k: v for k, v in arguments.items() if k in ("max_seqlen", "p") and v
                    },
                    "direction": direction,
                    "microseconds": {n: 1e6 * t.median for n, t in seconds.items()},
                    "p20_p80": {n: [1e6 * t.p20, 1e6 * t.p80] for n, t in seconds.items()},
                    "percent_of_bandwidth": 100 * moved / ours / 1e9 / measured["copy_gb_per_s"],
                    "percent_of_matrix_peak": 100 * flops / ours / 1e12 / measured["bf16_tflops"],
                }
            )
            print(rows[-1], flush=True)
    return {"peaks": measured, "rows": rows}


def _remove_failing(slug: str, pairs: dict[str, tuple[Callable, Callable]]) -> None:
    """Run each pair once; a peer that fails is removed, with a printed line."""
    for name, (forward, backward) in list(pairs.items()):
        try:
            backward(forward())
        except Exception as error:
            if name in GPU_BACKENDS:
                raise
            print(f"{slug}: {name} does not run: {error!s:.200}", flush=True)
            del pairs[name]


def _nothing(y: Any) -> None:
    """The backward of a peer without one."""


def _plain_embed(
    ids: Any,
    positions: Any,
    types: Any,
    word: Any,
    position: Any,
    type_: Any,
    weight: Any,
    bias: Any,
    p: float,
    seed: Any,
) -> Any:
    x = tnf.embedding(ids, word) + tnf.embedding(positions, position)
    x = tnf.layer_norm(x + tnf.embedding(types, type_), x.shape[-1:], weight, bias)
    return tnf.dropout(x, p)


def _plain_norm(x: Any, residual: Any, weight: Any, bias: Any, p: float, seed: Any) -> Any:
    return tnf.layer_norm(tnf.dropout(x, p) + residual, x.shape[-1:], weight, bias)


# the eager forms with torch's dropout, since torch 2.11 does not compile the reference's replayed one
PLAIN = {"embed": _plain_embed, "dropout_add_layer_norm": _plain_norm}


def _sdpa(qkv: Any, max_seqlen: int, p: float = 0.0, **rest: Any) -> Any:
    """Attention as a user of stock torch calls it, for sequences of one length."""
    q, k, v = qkv.unflatten(0, (-1, max_seqlen)).permute(2, 0, 3, 1, 4)
    out = tnf.scaled_dot_product_attention(q, k, v, dropout_p=p)
    return out.transpose(1, 2).flatten(0, 1)


def _forced(backend: Any, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        with backend.use(name):
            return op(**arguments)

    return call


def works(rehearsal: bool) -> Iterator[tuple[str, list[int], bool]]:
    """(name, lengths of the sentences, whether it trains): with 41 % real tokens, or without padding."""
    if rehearsal:
        yield from (("training step", [9, 4], True), ("inference B=1", [9], False))
        return
    yield "training step B=8, 41 % real", REAL, True
    yield "training step B=256, 41 % real", REAL * 32, True
    yield "training step B=64, S=512, full", [512] * 64, True
    yield "inference B=1, S=128", [128], False
    yield "inference B=8, 41 % real", REAL, False
    yield "inference B=256, 41 % real", REAL * 32, False


def models(device: str, rehearsal: bool) -> list[dict[str, Any]]:
    """Times whole steps of BERT-base under bf16 autocast: pretraining with dropout, and the encoder's inference."""
    from fastbert import bert
    from fastbert.models.config import BertConfig
    from fastbert.nn import InferenceRunner, TrainingRunner

    config = BertConfig(vocab_size=200, **TINY) if rehearsal else BertConfig(vocab_size=30522)
    ours = bert.BertForPreTraining(config).to(device)
    stock = _stock(config, device)
    rows = []
    for name, given, training in works(rehearsal):
        batch = _batch(given, config.vocab_size, device)
        graph = TrainingRunner(ours) if training else InferenceRunner(ours.bert)
        models = {"fastbert": ours, "fastbert, graph": graph, **stock}
        calls = {n: _call(m, batch, training, device) for n, m in models.items()}
        rows.append(_timed(name, calls, rehearsal))
        print(name, {n: round(t[0], 3) for n, t in rows[-1]["milliseconds"].items()}, flush=True)
    return rows


def _batch(lengths: list[int], vocab: int, device: str) -> dict[str, Any]:
    """A pretraining batch of random ids, 15 % of the real ones labelled."""
    size = torch.tensor(lengths, device=device)
    mask = (torch.arange(max(lengths), device=device) < size[:, None]).long()
    ids = torch.randint(vocab, mask.shape, device=device)
    labels = ids.where((torch.rand(ids.shape, device=device) < 0.15) & (mask == 1), -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "labels": labels, "next_sentence_label": torch.zeros_like(size)}


def _call(model: Any, batch: dict[str, Any], training: bool, device: str) -> Call:
    """A function for one training step without the optimiser, or for one inference of the encoder."""
    from fastbert.nn import TrainingRunner

    low = torch.autocast(device, torch.bfloat16)
    module = model if isinstance(model, torch.nn.Module) else model.model
    module.train(training)
    parameters, encoder = list(module.parameters()), getattr(model, "bert", model)

    def step() -> None:
        for p in parameters:
            p.grad = None
        with low:
            out = model(**batch)
        if not isinstance(model, TrainingRunner):
            out.loss.backward()

    def infer() -> None:
        with torch.no_grad(), low:
            encoder(batch["input_ids"], batch["attention_mask"])

    return step if training else infer


def _timed(name: str, calls: dict[str, Call], rehearsal: bool) -> dict[str, Any]:
    """A row: median, p20 and p80 of each call, interleaved."""
    from fastbert.testing.timing import interleave

    times = interleave(calls, *((1, 0) if rehearsal else (20, 3)))
    spread = {n: [1e3 * v for v in (t.median, t.p20, t.p80)] for n, t in times.items()}
    return {"work": name, "milliseconds": spread}


def _stock(config: Any, device: str) -> dict[str, Any]:
    """transformers' models of the same size: eager, SDPA, and on a GPU compiled."""
    import transformers

    same = transformers.BertConfig(**{n: getattr(config, n) for n in ("vocab_size", *TINY)})
    found = {}
    for attention in ("eager", "sdpa"):
        model = transformers.BertForPreTraining._from_config(same, attn_implementation=attention)
        found[attention] = model.to(device)
    for name, mode in {"compiled": None, "compiled, graph": "reduce-overhead"}.items():
        if device != "cuda":
            break
        model = transformers.BertForPreTraining._from_config(same, attn_implementation="sdpa")
        # Module.compile compiles calls of that module only, and inference calls the encoder inside
        for module in (model.to(device), model.bert):
            module.compile(dynamic=False, mode=mode)
        found[name] = model
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", type=Path, default=GPU_JSON)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="the parts to run; default all"
    )
    options = parser.parse_args()
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads this variable when it is imported
        command = [sys.executable, "-m", "benchmarks.gpu.gpu", *sys.argv[1:]]
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        sys.exit(subprocess.run(command, cwd=ROOT, env=env, check=False).returncode)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error(
            "there is no GPU that torch can use: --rehearse runs this on a CPU with tiny shapes"
        )
    import fastbert
    from fastbert.files import write_text
    from fastbert.machine import machine_info

    device = "cpu" if options.rehearse else "cuda"
    # the CPU's order does not contain Triton
    forced = fastbert.use("triton" if options.rehearse else None)
    report: dict[str, Any] = {
        "rehearsal": options.rehearse,
        "machine": machine_info(),
        "clocks": clocks(device),
    }
    if set(options.parts) < set(PARTS) and options.out.is_file():
        # the file keeps its other parts
        report = {**json.loads(options.out.read_text()), **report}
    # each part is written at once, so that a failure keeps the parts before it
    parts: dict[str, Callable[[], Any]] = {
        "parity": lambda: parity(options.rehearse),
        "sanitizer": sanitized,
        "ops": lambda: ops(device, options.rehearse),
        "models": lambda: models(device, options.rehearse),
    }
    with forced:
        for name in options.parts:
            print(f"{name} ...", flush=True)
            report[name] = parts[name]()
            write_text(options.out, json.dumps(report, indent=1) + "\n")
    print(f"written to {options.out}")
    if report.get("parity", {}).get("code"):
        print(report["parity"]["tail"])
        sys.exit("parity tests failed: the figures above are of wrong kernels")


if __name__ == "__main__":
    main()
