"""Encoders of transformers, as they are and accelerated: `python -m benchmarks.models.families [--rows NAME ...]`.

Random weights at the sizes of the published models. A batch is 8 sequences of 128 columns, of which 41 % are tokens, or
8 images of 224 x 224; ViLT's is 8 pairs of a text and an image, whose sizes are IMAGES. transformers computes with
sdpa, where a family has it. Before a row is timed, the outputs at tokens, or the losses, must agree. Every round times
both in turns; the figure is the ratio round by round: the median, with p20 and p80. docs/accelerate.md has the table;
--quick tries everything with small models.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastbert
from benchmarks import RESULTS, ROOT
from benchmarks.report.readme import filled, replaced
from fastbert.files import write_text
from fastbert.integrations import layers
from fastbert.integrations.forms import forms
from fastbert.machine import machine_info
from fastbert.nn.packing import Packing
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import rotated

JSON = RESULTS / "families.json"
PAGE = ROOT / "docs" / "accelerate.md"
BEGIN, END = "<!-- table: python -m benchmarks.models.families -->", "<!-- end of table -->"
LENGTHS = (128, 30, 45, 22, 80, 17, 60, 33)
LONG = 8192
# heights and widths of ViLT's images, padded to the largest, and the lengths of its texts
IMAGES = (
    *((384, 608), (384, 384), (256, 384), (384, 256)),
    *((192, 384), (320, 384), (384, 320), (224, 224)),
)
TEXTS = (20, 10, 12, 8, 30, 15, 9, 11)
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
MODERN = BASE | {"num_hidden_layers": 22, "intermediate_size": 1152, "vocab_size": 50368}
ESM = {
    "hidden_size": 480,
    "num_hidden_layers": 12,
    "num_attention_heads": 20,
    "intermediate_size": 1920,
    "vocab_size": 33,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "emb_layer_norm_before": False,
}
EURO = BASE | {
    "num_key_value_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 32768,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mask_token_id": 3,
}
VIT = BASE | {"intermediate_size": 3072}
CLIP = VIT | {"image_size": 224, "patch_size": 32}
DEBERTA = BASE | {
    "vocab_size": 128100,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "max_relative_positions": -1,
    "layer_norm_eps": 1e-7,
}
CLASSES = "ForImageClassification"
# row: (transformers' names of the family and the head, its sizes, whether a step is trained, the goal)
ROWS: dict[str, tuple[str, str, dict[str, Any], bool, float | None]] = {
    "ModernBERT-base, inference": ("ModernBert", "Model", MODERN, False, 2.2),
    "ModernBERT-base, MLM training step": ("ModernBert", "ForMaskedLM", MODERN, True, 3.0),
    "ESM-2 35M, inference": ("Esm", "Model", ESM, False, 2.0),
    "ESM-2 35M, fine-tuning step": ("Esm", "ForSequenceClassification", ESM, True, 2.0),
    "MPNet-base, inference": ("MPNet", "Model", BASE, False, 2.0),
    "MPNet-base, fine-tuning step": ("MPNet", "ForSequenceClassification", BASE, True, 2.0),
    "NomicBERT-base, inference": ("NomicBert", "Model", BASE, False, None),
    "ALBERT-base, inference": ("Albert", "Model", BASE | {"intermediate_size": 3072}, False, None),
    "EuroBERT-210M, inference": ("EuroBert", "Model", EURO, False, None),
    "DeBERTa-v3-base, inference": ("DebertaV2", "Model", DEBERTA, False, None),
    "DeBERTa-v3-base, fine-tuning step": (
        "DebertaV2",
        "ForSequenceClassification",
        DEBERTA,
        True,
        None,
    ),
    "ModernBERT-base, inference, frozen": ("ModernBert", "Model", MODERN, False, None),
    "ModernBERT-base, inference, int8": ("ModernBert", "Model", MODERN, False, None),
    "MPNet-base, inference, frozen": ("MPNet", "Model", BASE, False, None),
    "MPNet-base, inference, int8": ("MPNet", "Model", BASE, False, None),
    "ViT-base, inference": ("ViT", CLASSES, VIT, False, 1.15),
    "ViT-base, fine-tuning step": ("ViT", CLASSES, VIT, True, 1.15),
    "ViT-base, inference, frozen": ("ViT", CLASSES, VIT, False, 1.15),
    "ViT-base, inference, int8": ("ViT", CLASSES, VIT, False, None),
    "CLIP-base, images, inference": ("CLIPVision", "Model", CLIP, False, 1.15),
    "CLIP-base, images, fine-tuning step": ("CLIP", CLASSES, {"vision_config": CLIP}, True, 1.15),
    "CLIP-base, images, inference, frozen": ("CLIPVision", "Model", CLIP, False, 1.15),
    "CLIP-base, images, inference, int8": ("CLIPVision", "Model", CLIP, False, None),
    "ViLT-base, mixed sizes, inference": ("Vilt", "Model", VIT, False, 1.5),
    "ViLT-base, mixed sizes, fine-tuning step": ("Vilt", "ForQuestionAnswering", VIT, True, 1.5),
}
# the end of a row's name -> what is called after accelerate, and the largest error that it may have
PREPARED = {"frozen": (fastbert.freeze, 1e-4), "int8": (fastbert.quantize, 5e-2)}
WINDOW = "ModernBERT-base, a local layer: 8,192 tokens as one sequence / as 8"
WINDOW_GOAL = 1.25


def build(family: str, head: str, sizes: dict[str, Any], quick: bool) -> Any:
    """The model with random weights; `quick` makes it small."""
    import transformers

    torch.manual_seed(0)
    small: dict[str, Any] = {"num_hidden_layers": 2} if quick else {}
    if quick and "vision_config" in sizes:
        small = {"vision_config": sizes["vision_config"] | small}
    config = getattr(transformers, f"{family}Config")(**sizes | small)
    return getattr(transformers, family + head)(config)


def batch(model: Any, head: str) -> dict[str, torch.Tensor]:
    """A padded batch of random ids, or of images, with the head's labels: 30 % of the tokens for a masked LM."""
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        given = {"pixel_values": torch.randn(len(LENGTHS), 3, 224, 224)}
        return given | ({"labels": torch.randint(0, 2, (len(LENGTHS),))} if head == CLASSES else {})
    if hasattr(model.config, "max_image_length"):
        return _pairs(model, head)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    vocabulary, pad = model.config.vocab_size, model.config.pad_token_id or 0
    ids = torch.randint(4, min(vocabulary, 30000) - 1, mask.shape).where(mask.bool(), pad)
    given = {"input_ids": ids, "attention_mask": mask}
    if head == "ForMaskedLM":
        given["labels"] = ids.where((torch.rand(mask.shape) < 0.3) & mask.bool(), -100)
    if head == "ForSequenceClassification":
        given["labels"] = torch.randint(0, 2, (len(LENGTHS),))
    return given


def _pairs(model: Any, head: str) -> dict[str, torch.Tensor]:
    """ViLT's texts and images, with soft labels for its head."""
    mask = (torch.arange(max(TEXTS)) < torch.tensor(TEXTS)[:, None]).long()
    pixels = torch.randn(len(IMAGES), 3, *map(max, zip(*IMAGES, strict=True)))
    shown = torch.zeros(pixels[:, 0].shape, dtype=torch.long)
    for image, (height, width) in zip(shown, IMAGES, strict=True):
        image[:height, :width] = 1
    given = {
        "input_ids": torch.randint(4, 30000, mask.shape).where(mask.bool(), 0),
        "attention_mask": mask,
        "pixel_values": pixels,
        "pixel_mask": shown,
    }
    if head == "ForQuestionAnswering":
        given["labels"] = torch.rand(len(IMAGES), model.config.num_labels)
    return given


def call_of(model: Any, given: dict[str, torch.Tensor], trained: bool) -> Callable[[], Any]:
    """One forward in inference mode, which returns the output, or one step with AdamW, which returns the loss."""
    if not trained:
        model.eval()

        def infer() -> Any:
            with torch.inference_mode():
                return model(**given)

        return infer
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> Any:
        loss = model(**given).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def ratios(calls: dict[str, Callable[[], Any]], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the first call over those of the second, and of the second, round by round."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name in rotated(list(calls), number):
            started = time.perf_counter()
            calls[name]()
            if number >= 0:
                taken[name].append(time.perf_counter() - started)
    first, second = taken.values()
    return [a / b for a, b in zip(first, second, strict=True)], second


def _agreeing(output: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What both forms must agree in: the loss or logits, or the last hidden states at the text's tokens."""
    mask = given.get("attention_mask")
    y = output[0]
    return y if mask is None or y.dim() < 3 else y[:, : mask.shape[1]][mask.bool()]


def measured(row: str, quick: bool, rounds: int) -> dict[str, Any]:
    """The result of one row. Raises AssertionError where the two forms do not agree."""
    family, head, sizes, trained, goal = ROWS[row]
    stock = build(family, head, sizes, quick)
    prepare, most = PREPARED.get(row.rpartition(", ")[2], (lambda m: m, 1e-4))
    fast = prepare(fastbert.accelerate(copy.deepcopy(stock)))
    given = batch(stock, head)
    if not trained:
        given.pop("labels", None)
    for m in (stock, fast):
        m.eval()
    runs, run = [], layers.run
    layers.run = lambda *args: runs.append(1) or run(*args)  # type: ignore[func-returns-value]
    try:
        with torch.no_grad():
            ours, theirs = (_agreeing(m(**given), given) for m in (fast, stock))
    finally:
        layers.run = run
    copies = fastbert.frozen_bytes(fast)
    depth = getattr(stock.config, "vision_config", stock.config).num_hidden_layers
    assert copies or len(runs) == depth, f"{row}: transformers' own code ran"
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < most, f"{row}: the outputs differ by {error:.1e} of the largest"
    for m in (stock, fast):
        m.train(trained)
    calls = {"stock": call_of(stock, given, trained), "fast": call_of(fast, given, trained)}
    return summary(*ratios(calls, rounds), goal, float(error))


def window(quick: bool, rounds: int) -> dict[str, Any]:
    """A layer with a window, on one sequence and on eight of the same tokens together: seconds of one / of eight."""
    length = LONG // 8 if quick else LONG
    model = build("ModernBert", "Model", MODERN | {"max_position_embeddings": LONG}, True)
    model.config.layer_types[:] = ["sliding_attention"] * len(model.layers)
    fast = fastbert.accelerate(model).eval()
    layer, family = fast.layers[1], type(fast).fastbert_family
    parts = (family.layout.of(layer),)
    x = torch.randn(length, model.config.hidden_size)

    def call(count: int) -> Callable[[], Any]:
        packing = Packing.full(count, length // count, x.device)
        form = forms(family, fast, [layer], parts, packing)
        given = layers.Call(family, packing, None, True, parts=parts, forms=form)

        def run() -> Any:
            with torch.inference_mode():
                return layers.run(parts[0], x, given)

        return run

    return summary(*ratios({"one": call(1), "eight": call(8)}, rounds), WINDOW_GOAL, 0.0)


def summary(
    found: list[float], seconds: list[float], goal: float | None, error: float
) -> dict[str, Any]:
    """Percentiles of the ratios, as the JSON has them."""
    p20, median, p80 = np.percentile(found, [20, 50, 80]).tolist()
    return {
        "ratio": {"median": median, "p20": p20, "p80": p80},
        "seconds": float(np.median(seconds)),
        "rounds": len(found),
        "goal": goal,
        "error": error,
    }


def _patches() -> str:
    counts = [height // 32 * (width // 32) for height, width in IMAGES]
    return f"{sum(counts)} of 8 x {max(counts)} patches"


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| model and work | times as fast as transformers | goal |", "|---|---|---|"]
    for name, row in found["rows"].items():
        r, goal = row["ratio"], row["goal"]
        shown = f"{r['median']:.2f} ({r['p20']:.2f} to {r['p80']:.2f})"
        if name == WINDOW:
            met = "met" if r["median"] <= goal else "**missed**"
            lines.append(f"| {name} | {shown} times the time | at most {goal}: {met} |")
            continue
        met = "" if goal is None else f"{goal}: {'met' if r['median'] >= goal else '**missed**'}"
        lines.append(f"| {name} | {shown} | {met} |")
    m, (before, after) = found["machine"], found["peaks"]
    v = m["versions"]
    lines += [
        "",
        filled(
            f"{m['date']}, {m['cpu']} ({m['instructions']}), {m['threads']} threads, fp32, fastbert {v['fastbert']}, "
            f"torch {v['torch']}, transformers {found['transformers']}: {sum(LENGTHS)} tokens in "
            f"{len(LENGTHS)} x {max(LENGTHS)}, or 8 images; ViLT's have {_patches()}, its texts {sum(TEXTS)} of 8 x "
            f"{max(TEXTS)} tokens. AdamW included in steps. Multiply-adds on registers: {before:.0f} and "
            f"{after:.0f} GFLOP/s before and after."
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write; the page only where the JSON is the repository's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="models of two layers, to see it run")
    parser.add_argument("--rows", nargs="+", default=[*ROWS, WINDOW], choices=[*ROWS, WINDOW])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of every row")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON to write; rows in it are kept")
    options = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    kept = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    before = peaks(1.0 if options.quick else 4.0)["fma_gflops_fp32"]
    for name in options.rows:
        rounds = 2 if options.quick else options.rounds
        if name == WINDOW:
            kept[name] = window(options.quick, rounds)
        else:
            kept[name] = measured(name, options.quick, rounds)
        print(name, json.dumps(kept[name]), flush=True)
    found = {
        "rows": {name: kept[name] for name in (*ROWS, WINDOW) if name in kept},
        "peaks": [before, peaks(1.0 if options.quick else 4.0)["fma_gflops_fp32"]],
        "machine": machine_info(),
        "transformers": transformers.__version__,
    }
    write_text(options.out, json.dumps(found, indent=1) + "\n")
    print(table(found))
    if options.out == JSON:
        write_text(PAGE, replaced(PAGE.read_text(), table(found), BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
