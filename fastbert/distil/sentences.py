"""Distillation of sentence encoders: sentences, their vectors, and the folder of a student."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert.data import Batch, tokenizer_hash
from fastbert.data.corpus import texts_in
from fastbert.distil.config import DistilConfig
from fastbert.distil.models import Models
from fastbert.distil.plan import Wanted
from fastbert.distil.signals import Signals, Tap
from fastbert.distil.work import Divided, check_divisible
from fastbert.files import listed, parse_json, quoted, read_lines, read_text, why_not_text
from fastbert.finetune.features import Features, Shuffled, split
from fastbert.finetune.records import SUFFIXES, is_saved, read_records, suffix_of
from fastbert.infer import Embedder
from fastbert.integrations.sentence_transformers import POOLING_SWITCHES, fill, pool
from fastbert.models.encoder import BertModel
from fastbert.models.inputs import prepare
from fastbert.train.session import Session
from fastbert.train.trainer import Stream

# names of the columns of two sentences and of a score for their likeness
_PAIRS = (("text", "pair", "score"), ("sentence1", "sentence2", "score"))
# folder of the map from a student's width to the teacher's
_MAP = "2_Dense"
# files of the teacher's folder that hold for a student too
_KEPT = ("sentence_bert_config.json", "config_sentence_transformers.json")


class Sentences:
    """Sentences, a line or a record each; a student learns the teacher's vectors."""

    kind = BertModel
    higher = True

    def __init__(self, s: Session[DistilConfig], models: Models, train: Any = None) -> None:
        c = s.config
        assert c.max_length is not None
        self.config, self.world, self.models = c, s.world, models
        self.teacher = Embedder(models.folder)
        self.teacher.max_length = min(self.teacher.max_length, c.max_length)
        self.tokenizer = self.teacher.tokenizer
        texts = _texts(c.sources if train is None else [train], c.field)
        self.pairs, held = _validation(c.validation, c.field)
        if c.validation is None:
            kept, out = split(texts, c.heldout or 0.0, c.split_seed)
            texts, held = [texts[i] for i in kept], [texts[i] for i in out]
        self.test_pairs, self.test_texts = _validation(c.test, c.field)
        self.metric = "cosine" if self.pairs is None else "spearman"
        self.texts, self.held = texts, held
        # a copy of the layers after the pooling, which moves to the models' device; Embedder runs its own on the CPU
        self._layers = copy.deepcopy(self.teacher.about.layers)
        # the teacher's vectors of texts that are judged
        self._known: dict[int, Tensor] = {}

    def load_teacher(self) -> Any:
        return self.teacher.model

    def open(self) -> None:
        assert self.config.batch_size is not None
        batches = Shuffled(self._features(self.texts), self.config.batch_size, self.config.seed)
        check_divisible(len(batches), self.world)
        self.batches: Stream = Divided(batches, self.world)
        self.epoch = len(batches)

    def load_student(self, folder: Path) -> tuple[Any, nn.Module | None]:
        model = BertModel.from_pretrained(folder, add_pooler=False)
        head = self.head(model.config.hidden_size)
        if head is not None:
            _load_map(head, folder)
        return model, head

    def head(self, width: int) -> nn.Module | None:
        """A map to the teacher's width, before the layers that follow its pooling."""
        modes, own = len(self.teacher.pooling), self.teacher.model.config.hidden_size
        if width == own:
            return None
        found = nn.Linear(width * modes, own * modes, bias=False)
        student = self.models.student_folder
        if student is not None and (student / _MAP).is_dir():
            # a student that was saved is trained further with its map
            _load_map(found, student)
        return found

    def labels(self, batch: Batch) -> int:
        return len(batch["cu_seqlens"]) - 1

    def signals(
        self, model: Any, batch: Batch, taps: Tap, wanted: Wanted, head: nn.Module | None = None
    ) -> Signals:
        found = taps.clear()
        x = model.encode(prepare(model.config, **batch)).x
        if not wanted.vectors:
            return found
        t = self.teacher
        lengths = batch["cu_seqlens"].long().diff()
        with torch.autocast(x.device.type, enabled=False):
            vectors = pool(x.float(), lengths, t.pooling, t.skipped)
            vectors = vectors if head is None else head(vectors)
            found.vectors = self._layers.to(x.device)(vectors)
        return found

    def judge(self, model: Any, head: nn.Module | None = None) -> dict[str, float]:
        return self._judged(model, head, self.pairs, self.held)

    def judge_test(self, model: Any, head: nn.Module | None = None) -> dict[str, float] | None:
        if self.config.test is None:
            return None
        return self._judged(model, head, self.test_pairs, self.test_texts)

    def _judged(
        self,
        model: Any,
        head: nn.Module | None,
        pairs: NDArray[np.float64] | None,
        texts: Sequence[str],
    ) -> dict[str, float]:
        """Mean cosine to the teacher's vectors, and where there are scores Spearman's correlation x 100 with them."""
        key = id(texts)
        if key not in self._known:
            self._known[key] = tnf.normalize(self.teacher(texts))
        training = model.training
        student = copy.copy(self.teacher)
        first = [] if head is None else [copy.deepcopy(head).cpu()]
        layers = nn.Sequential(*first, *self.teacher.about.layers)
        student.about = dataclasses.replace(self.teacher.about, layers=layers)
        student.model = model.eval()
        try:
            vectors = tnf.normalize(student(texts))
        finally:
            model.train(training)
            # the tokenizer is saved as the teacher's was
            self.tokenizer.no_truncation()
        found = {"cosine": float((vectors * self._known[key]).sum(1).mean())}
        if pairs is not None:
            half = len(pairs)
            likeness = (vectors[:half] * vectors[half:]).sum(1).double().numpy()
            found["spearman"] = 100.0 * spearman(likeness, pairs)
        return found

    def extras(self, head: nn.Module | None) -> list[Callable[[Path], None]]:
        return [lambda folder: self._write(folder, head)]

    def _write(self, folder: Path, head: nn.Module | None) -> None:
        """Make the folder one of sentence-transformers: pooling, the map of another width, the teacher's layers."""
        modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
        width = self.teacher.model.config.hidden_size
        if isinstance(head, nn.Linear):
            modules.append(("Dense", _MAP))
            width = head.in_features // len(self.teacher.pooling)
            _write_dense(folder / _MAP, head)
        pooling = {
            "word_embedding_dimension": width,
            # the names that every version of the library reads
            **{name: mode in self.teacher.pooling for name, mode in POOLING_SWITCHES.items()},
            "include_prompt": self.teacher.about.include_prompt,
        }
        _write_json(folder / "1_Pooling" / "config.json", pooling)
        file = self.models.folder / "modules.json"
        for entry in parse_json(read_text(file))[2:] if file.is_file() else []:
            kind = str(entry["type"]).rpartition(".")[2]
            modules.append((kind, f"{len(modules)}_{kind}"))
            (folder / modules[-1][1]).mkdir()
            source = self.models.folder / entry.get("path", "")
            if source != self.models.folder and source.is_dir():
                shutil.copytree(source, folder / modules[-1][1], dirs_exist_ok=True)
        for name in _KEPT:
            places = (self.models.encoder / name, self.models.folder / name)
            if kept := next(filter(Path.is_file, places), None):
                shutil.copyfile(kept, folder / name)
        entries = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(modules)
        ]
        _write_json(folder / "modules.json", entries)

    def identity(self) -> dict[str, Any]:
        digest = {
            name: hashlib.sha256(json.dumps(texts).encode()).hexdigest()
            for name, texts in (("train", self.texts), ("validation", self.held))
        }
        return {
            "the tokenizer": tokenizer_hash(self.tokenizer),
            **{f"the {name} data": value for name, value in digest.items()},
        }

    def describe(self) -> str:
        held = f"{len(self.held)} held out"
        if self.pairs is not None:
            held = f"{len(self.pairs)} scored pairs for validation"
        return f"{len(self.texts)} sentences, {held}"

    def _features(self, texts: Sequence[str]) -> Features:
        """The tokenised sentences, with the teacher's prompt and cut to its length."""
        features = Features()
        one_type = self.teacher.model.config.type_vocab_size == 1
        self.tokenizer.enable_truncation(self.teacher.max_length)
        encodings = self.tokenizer.encode_batch([self.teacher.prompt + text for text in texts])
        self.tokenizer.no_truncation()
        for i, e in enumerate(encodings):
            features.add(e.ids, [0] * len(e.ids) if one_type else e.type_ids, i)
        features.check_tokens(self.teacher.model.config.vocab_size)
        return features


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's rank correlation of two lists of numbers; equal numbers have the mean of their ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, number, count = np.unique(values, return_inverse=True, return_counts=True)
    ends: NDArray[np.float64] = count.cumsum() - (count - 1) / 2
    return ends[number]


def _texts(sources: Sequence[Any], field: str) -> list[str]:
    """The sentences of files, folders and records; raises ValueError for one that is empty or no text."""
    found: list[str] = []
    for source in chain.from_iterable(map(_parts, sources)):
        if isinstance(source, (list, tuple)) and all(isinstance(text, str) for text in source):
            found += _checked(source, "sentence {} of the data")
            continue
        path = Path(source) if isinstance(source, (str, Path)) else None
        if path is not None and path.is_file() and suffix_of(path) not in SUFFIXES:
            lines = [line for line in read_lines(path) if line.strip()]
            found += _checked(lines, f"line {{}} of {path}")
        else:
            found += [record.string(field) for record in read_records(source, "train")]
    if not found:
        name = listed(s if isinstance(s, (str, Path)) else "the data" for s in sources)
        raise ValueError(f"{name} holds no sentence: name files with some")
    return found


def _parts(source: Any) -> list[Any]:
    """The files of a folder of texts; any other source alone."""
    folder = Path(source) if isinstance(source, (str, Path)) else None
    if folder is None or not folder.is_dir() or is_saved(folder):
        return [source]
    return list(texts_in(folder))


def _checked(texts: Sequence[str], name: str) -> list[str]:
    for number, text in enumerate(texts, 1):
        if reason := why_not_text(text):
            raise ValueError(f"{name.format(number)} {reason}")
    return list(texts)


def _validation(source: str | None, field: str) -> tuple[NDArray[np.float64] | None, list[str]]:
    """The scores of pairs and their sentences, first ones then second ones; or None and plain sentences."""
    if source is None:
        return None, []
    path = Path(source)
    if not is_saved(path) if path.is_dir() else suffix_of(path) not in SUFFIXES:
        return None, _texts([source], field)
    records = read_records(source, "validation")
    names = next((names for names in _PAIRS if set(names) <= set(records[0].values)), None)
    if names is None:
        if field in records[0].values:
            return None, [record.string(field) for record in records]
        raise ValueError(
            f"{source} has the fields {listed(records[0].values)}: name them text, pair and score for scored pairs, or "
            f"{quoted(field)} for sentences"
        )
    first, second, score = names
    scores = []
    for record in records:
        try:
            scores.append(float(record.value(score)))
        except (TypeError, ValueError):
            scores.append(float("nan"))
        if not np.isfinite(scores[-1]):
            raise ValueError(
                f"{record.place}: {score} is {quoted(record.value(score))}: it must be a number"
            )
    if len(set(scores)) < 2:
        raise ValueError(f"{source} gives all pairs one score: there is no order to compare with")
    texts = [record.string(name) for name in (first, second) for record in records]
    return np.array(scores), texts


def _load_map(linear: nn.Module, student: Path) -> None:
    """Read the map in a student's folder."""
    with torch.no_grad():
        fill(linear, student / _MAP, "linear.")


def _write_dense(folder: Path, linear: nn.Linear) -> None:
    """A module of sentence-transformers that multiplies by a matrix."""
    settings = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    _write_json(folder / "config.json", settings)
    weight = linear.weight.detach().cpu().contiguous()
    save_file({"linear.weight": weight}, folder / "model.safetensors")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
