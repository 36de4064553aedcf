"""PretrainConfig: every setting of `fastbert pretrain`, from a TOML or YAML file, from flags, or from Python."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# settings that may differ between a run and its resumption: they change no loss
FREE = ("checkpoint_every", "keep_last")
# one of these says how long to train; what it came to in steps is recorded
LENGTHS = ("steps", "epochs", "minutes")


def setting(default: Any, group: str, comment: str) -> Any:
    """A field whose comment is also its line in `fastbert pretrain --help`."""
    metadata = {"group": group, "comment": comment}
    if isinstance(default, list):
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


DATA, TOKENIZER, MODEL = "Data", "Tokenizer", "Model"
BATCH, OPTIMISER, RUN = "Length and batches", "Optimiser", "Run"


@dataclass
class PretrainConfig:
    """The settings of a pretraining run; None stands for what the comment says.

    Raises TypeError or ValueError, naming the setting, for values that can't be.
    """

    sources: list[str] = setting(
        [], DATA, "text files, folders, .jsonl or .gz files, or - for standard input"
    )
    separator: str | None = setting(
        None,
        DATA,
        "line that ends a document in text files, '' for a blank one; default one per file",
    )
    field: str = setting("text", DATA, "field of a .jsonl line that holds its text")
    heldout: float = setting(0.05, DATA, "part of the documents that is kept for evaluation")
    recipe: str = setting(
        "bert", DATA, "bert: sentence pairs, MLM + NSP; roberta: full sentences, MLM only"
    )
    max_length: int = setting(128, DATA, "tokens in the longest sequence, [CLS] and [SEP] included")
    short_seq_prob: float = setting(
        0.1, DATA, "part of the sequences that is cut to a random shorter length"
    )
    mask_prob: float = setting(0.15, DATA, "part of the tokens that is to be predicted")
    whole_word: bool = setting(False, DATA, "mask whole words, not single pieces of them")
    data_dir: str | None = setting(
        None, DATA, "folder of the tokenised shards, to share between runs; default OUT/data"
    )

    tokenizer: str | None = setting(
        None, TOKENIZER, "folder or tokenizer.json to use; without it one is trained on the sources"
    )
    tokenizer_kind: str | None = setting(
        None, TOKENIZER, "wordpiece or bpe; default what the recipe used, wordpiece for bert"
    )
    vocab_size: int = setting(30522, TOKENIZER, "tokens of a tokenizer that is trained")
    lowercase: bool = setting(True, TOKENIZER, "a trained WordPiece tokenizer lowercases its text")

    layers: int = setting(12, MODEL, "encoder layers")
    hidden: int = setting(768, MODEL, "width of the encoder")
    heads: int = setting(12, MODEL, "attention heads")
    ffn: int | None = setting(None, MODEL, "width of the feed-forward block; default 4 x hidden")
    max_position: int = setting(512, MODEL, "tokens in the longest sequence the model can ever see")
    positions: str = setting("absolute", MODEL, "absolute (learned) or sinusoidal positions")
    dropout: float = setting(0.1, MODEL, "dropout of hidden states")
    attention_dropout: float | None = setting(
        None, MODEL, "dropout of attention weights; default as dropout"
    )
    initializer_range: float = setting(
        0.02, MODEL, "standard deviation of the normal distribution of fresh weights"
    )
    start: str = setting(
        "normal",
        MODEL,
        "normal, or neighbours: some heads start at the next tokens, for short trainings",
    )
    init_from: str | None = setting(
        None, MODEL, "model folder to start from; its sizes and its tokenizer are used"
    )

    steps: int | None = setting(None, BATCH, "optimiser steps; wins over epochs and minutes")
    epochs: float | None = setting(None, BATCH, "passes over the training data")
    minutes: float | None = setting(
        None, BATCH, "time for the steps; the first ones are timed and fix the number of steps"
    )
    max_tokens: int | None = setting(None, BATCH, "tokens in a batch; default 8192")
    batch_size: int | None = setting(None, BATCH, "sequences in a batch, instead of max_tokens")
    accumulate: int = setting(1, BATCH, "batches whose gradients make one step")

    lr: float = setting(1e-4, OPTIMISER, "peak learning rate of AdamW")
    warmup: float = setting(
        0.1, OPTIMISER, "steps of linear warm-up, as a part of all steps, or as a number from 1 on"
    )
    weight_decay: float = setting(0.01, OPTIMISER, "not applied to biases and LayerNorm")
    beta1: float = setting(0.9, OPTIMISER, "decay of AdamW's first moment")
    beta2: float = setting(0.999, OPTIMISER, "decay of AdamW's second moment")
    epsilon: float = setting(1e-6, OPTIMISER, "AdamW's epsilon")
    clip: float = setting(1.0, OPTIMISER, "largest norm of the gradient, 0 for no limit")

    precision: str = setting("fp32", RUN, "fp32, or bf16 autocast with fp32 weights")
    device: str | None = setting(None, RUN, "cpu, cuda or cuda:1; default cuda where there is one")
    threads: int | None = setting(None, RUN, "CPU threads; default what torch takes")
    backend: str | None = setting(
        None, RUN, "force one kernel backend; default the fastest of each"
    )
    recompute: bool = setting(False, RUN, "keep fewer activations and compute them twice")
    seed: int = setting(0, RUN, "of weights, data order, masks and dropout")
    split_seed: int = setting(0, RUN, "of the choice of held-out documents, and of their masks")
    log_every: int = setting(10, RUN, "steps between lines of metrics.jsonl")
    eval_every: int = setting(500, RUN, "steps between evaluations, 0 for one at the end only")
    eval_tokens: int = setting(65536, RUN, "held-out tokens that an evaluation reads, 0 for all")
    checkpoint_every: int = setting(500, RUN, "steps between checkpoints, 0 for none but the last")
    keep_last: int = setting(2, RUN, "checkpoints to keep")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name, hint in hints.items():
            setattr(self, name, _typed(name, getattr(self, name), hint))
        self._check_choices()
        self._check_ranges()
        if self.max_tokens is None and self.batch_size is None:
            self.max_tokens = 8192
        if self.attention_dropout is None:
            self.attention_dropout = self.dropout
        if self.ffn is None:
            self.ffn = 4 * self.hidden
        if self.tokenizer_kind is None:
            self.tokenizer_kind = "wordpiece" if self.recipe == "bert" else "bpe"

    def _check_choices(self) -> None:
        from fastbert.backend import BACKENDS

        choices: dict[str, tuple[str | None, ...]] = {
            "recipe": ("bert", "roberta"),
            "tokenizer_kind": ("wordpiece", "bpe", None),
            "positions": ("absolute", "sinusoidal"),
            "start": ("normal", "neighbours"),
            "precision": ("fp32", "bf16"),
            "backend": (*BACKENDS, None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(str(a) for a in allowed if a is not None)
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {known}")
        if self.max_tokens is not None and self.batch_size is not None:
            raise ValueError("max_tokens and batch_size are both set: a batch is measured by one")

    def _check_ranges(self) -> None:
        shares = ["heldout", "short_seq_prob", "mask_prob", "dropout", "attention_dropout"]
        for name in (*shares, "beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value}: it must be in [0, 1)")
        if not self.mask_prob or not self.heldout:
            raise ValueError(
                "mask_prob and heldout must be above 0: there is nothing to learn or judge"
            )
        unlimited = ["weight_decay", "clip", "warmup", "seed", "split_seed", "eval_every"]
        for name in (*unlimited, "eval_tokens", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        positive = ["max_length", "vocab_size", "layers", "hidden", "heads", "ffn", "max_position"]
        positive += [*LENGTHS, "max_tokens", "batch_size", "accumulate", "lr", "epsilon", "threads"]
        positive += ["initializer_range"]
        for name in (*positive, "log_every", "keep_last"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be above 0")
        # more than these are slips of the keyboard that would hang or crash what is below
        for name, most in {
            "seed": 2**63 - 1,
            "split_seed": 2**63 - 1,
            "threads": 1024,
            "epochs": 10_000,
        }.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name} is {value}: it must be at most {most}")
        if self.max_length > self.max_position:
            raise ValueError(
                f"max_length {self.max_length} is above max_position {self.max_position}: raise max_position"
            )
        if self.max_tokens is not None and self.max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens {self.max_tokens} is below max_length {self.max_length}: a batch holds whole sequences"
            )

    @property
    def warmup_steps(self) -> int:
        """The steps of warm-up of a run whose number of steps is known."""
        assert self.steps is not None
        return round(self.warmup * self.steps) if self.warmup < 1 else round(self.warmup)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return dataclasses.asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """How `other`, some settings by name, differs: "lr is 0.001 there and 0.0001 here"."""
        mine = self.to_dict()
        return [
            f"{name} is {mine[name]!r} there and {value!r} here"
            for name, value in other.items()
            if name not in FREE and mine[name] != value
        ]

    def to_toml(self) -> str:
        """The text of a file that load_settings reads back; settings that are None are left out."""
        lines, group = [], None
        for f in dataclasses.fields(self):
            if f.metadata["group"] != group:
                group = f.metadata["group"]
                lines += ["", f"# {group}"]
            value = getattr(self, f.name)
            if value is not None:
                # JSON's numbers, strings, booleans and lists of these are also TOML's
                lines.append(f"{f.name} = {json.dumps(value, ensure_ascii=False)}")
        return "\n".join(lines[1:]) + "\n"


def check_length_said(settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless the settings say how long to train, once; steps may stand with what they came from."""
    given = [name for name in LENGTHS if settings.get(name) is not None]
    if not given:
        raise ValueError("how long to train is not said: pass one of steps, epochs and minutes")
    if len(given) > 1 and "steps" not in given:
        raise ValueError("epochs and minutes are both set: pass one of them")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the setting's type; whole numbers serve as floats, nothing else is converted."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not list else (hint,)
    kinds = kinds or (hint,)
    if value is None and type(None) in kinds:
        return None
    if any(typing.get_origin(kind) is list for kind in kinds):
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(v, (str, Path)) for v in values):
            return [str(v) for v in values]
    if isinstance(value, Path) and str in kinds:
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        value = float(value)
    if isinstance(value, str) and float in kinds and str not in kinds:
        # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    kind = next(k for k in kinds if k is not type(None))
    if type(value) is not kind:
        wanted = "list of strings" if typing.get_origin(kind) is list else kind.__name__
        raise TypeError(f"{name} is {value!r}: it must be a {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: it must be finite")
    return value


def load_settings(path: str | Path) -> dict[str, Any]:
    """Read the settings in a .toml, .yaml or .yml file.

    Raises FileNotFoundError, or ValueError for a file that can't be read or that has a name that is no setting.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        values = _parse(path)
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings: write lines such as `lr = 1e-4`")
    try:
        check_names(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return values


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        return tomllib.loads(text)
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    raise ValueError(f"its suffix is {path.suffix!r}, and a configuration is .toml, .yaml or .yml")


def check_names(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that is no setting, with the nearest one that is."""
    names = [f.name for f in dataclasses.fields(PretrainConfig)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
            raise ValueError(f"there is no setting {name!r}: did you mean {near[0]!r}?")


def merge(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file and of flags, which win; a flag for the length replaces the file's whole length."""
    settings = dict(file)
    for group in (LENGTHS, ("max_tokens", "batch_size")):
        if any(name in flags for name in group):
            settings = {k: v for k, v in settings.items() if k not in group}
    return {**settings, **flags}
