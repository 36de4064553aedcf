"""What the settings of all commands share: types, ranges, files, flags; and the settings of a training of any kind."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastbert.files import quoted, read_lines, shortened, why_not_unicode

# settings that may differ between a run and its resumption: they change no loss
FREE = ("checkpoint_every", "keep_last")
OPTIMISERS = ("adamw", "lamb", "muon")
SCHEDULES = ("linear", "wsd", "one-cycle")
# one of these gives the length of a training; a run records the steps that follow from it
LENGTHS = ("steps", "epochs", "minutes")

DATA, TOKENIZER, MODEL, LOSSES = "Data", "Tokenizer", "Model", "Losses"
BATCH, OPTIMISER, RUN = "Length and batches", "Optimiser", "Run"
GROUPS = (DATA, TOKENIZER, MODEL, LOSSES, BATCH, OPTIMISER, RUN)

Config = TypeVar("Config", bound="Settings")
Training = TypeVar("Training", bound="TrainingSettings")


def setting(
    default: Any,
    group: str,
    comment: str,
    *,
    path: bool | Callable[[str], bool] = False,
    check: Callable[[str], object] | None = None,
    zero_is_open: bool = False,
    positional: bool = False,
) -> Any:
    """A field whose comment is also its line in the command's --help.

    A `path` is recorded as an absolute one; a function says which values are paths. `check` raises for a path that a
    run cannot use. `zero_is_open` says that a run finds a value in the place of 0. A `positional` setting and
    a list have no flag: they are arguments.
    """
    metadata = {
        "group": group,
        "comment": comment,
        "path": path,
        "check": check,
        "zero_is_open": zero_is_open,
        "positional": positional,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(kind: type[Settings]) -> list[dataclasses.Field[Any]]:
    """The fields of a class of settings, group by group."""
    return sorted(dataclasses.fields(kind), key=lambda f: GROUPS.index(f.metadata["group"]))


@dataclass
class Settings:
    """Settings with checked types; raises TypeError or ValueError, naming the setting, for values that can't be."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            value = _typed(name, getattr(self, name), hint)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and (reason := why_not_unicode(text)):
                    raise ValueError(f"{name} {reason}")
            setattr(self, name, value)
        self._check()

    def _check(self) -> None:
        """Raise ValueError for values of the right type that can't be."""

    def _check_choices(self, choices: Mapping[str, tuple[str | None, ...]]) -> None:
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(str(a) for a in allowed if a is not None)
                raise ValueError(f"{name} is {quoted(getattr(self, name))}: choose one of {known}")

    def _check_shares(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value}: it must be in [0, 1)")

    def _check_least(self, least: int, *names: str) -> None:
        """At least 0, or above 0 where `least` is 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and (value < 0 or (least and value <= 0)):
                bound = "above 0" if least else "at least 0"
                raise ValueError(f"{name} is {value}: it must be {bound}")

    def _check_most(self, most: Mapping[str, float]) -> None:
        """Larger values are slips of the keyboard, with which torch would hang or crash."""
        for name, bound in most.items():
            value = getattr(self, name)
            if value is not None and value > bound:
                raise ValueError(f"{name} is {value}: it must be at most {bound}")

    def _check_used(self, used: bool, why_not: str, *names: str) -> None:
        """Refuse settings that are not at their defaults where nothing reads them."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not used and f.name in names and value != f.default:
                raise ValueError(f"{f.name} is {value} and {why_not}: leave it out")

    def check_paths(self) -> None:
        """Raise FileNotFoundError or ValueError for a path that a run cannot use; - is standard input."""
        for f in dataclasses.fields(self):
            value, check = getattr(self, f.name), f.metadata["check"]
            for path in value if isinstance(value, list) else [value]:
                if check is not None and path not in (None, "-"):
                    check(path)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return dataclasses.asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """How `other`, some settings by name, differs: "lr is 0.001 there and 0.0001 here"."""
        mine = self.to_dict()
        return [
            f"{name} is {quoted(mine[name])} there and {quoted(value)} here"
            for name, value in other.items()
            if name not in FREE and mine[name] != value
        ]

    def to_toml(self) -> str:
        """The text of a file that load_settings reads back; settings that are None are left out."""
        lines, group = [], None
        for f in settings_of(type(self)):
            if f.metadata["group"] != group:
                group = f.metadata["group"]
                lines += ["", f"# {group}"]
            value = getattr(self, f.name)
            if value is not None:
                # JSON's numbers, strings, booleans and lists of these are also TOML's, save of one character
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")
                lines.append(f"{f.name} = {text}")
        return "\n".join(lines[1:]) + "\n"


@dataclass
class TrainingSettings(Settings):
    """The settings of a training of any kind."""

    steps: int | None = setting(None, BATCH, "optimiser steps; wins over epochs and minutes")
    epochs: float | None = setting(None, BATCH, "passes over the training data")
    accumulate: int = setting(1, BATCH, "batches whose gradients make one step")

    optimiser: str = setting(
        "adamw", OPTIMISER, "adamw; lamb for large batches; muon for fewer steps of more work"
    )
    lr: float = setting(1e-4, OPTIMISER, "peak learning rate")
    schedule: str = setting(
        "linear",
        OPTIMISER,
        "of the rate after the warm-up: linear to 0; wsd: even, then linear to 0; one-cycle: both ways by a cosine",
    )
    decay: float = setting(
        0.2, OPTIMISER, "steps of wsd's fall, as a part of all steps, or as a number from 1 on"
    )
    warmup: float = setting(
        0.1, OPTIMISER, "steps of warm-up, as a part of all steps, or as a number from 1 on"
    )
    weight_decay: float = setting(0.01, OPTIMISER, "not applied to biases and LayerNorm")
    beta1: float = setting(0.9, OPTIMISER, "decay of the first moment")
    beta2: float = setting(0.999, OPTIMISER, "decay of the second moment")
    epsilon: float = setting(1e-6, OPTIMISER, "added to the root of the second moment")
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
    checkpoint_every: int = setting(500, RUN, "steps between checkpoints, 0 for none but the last")
    keep_last: int = setting(2, RUN, "checkpoints to keep")

    def _check(self) -> None:
        from fastbert.backend.names import BACKENDS

        backends = (*BACKENDS, None)
        self._check_choices({"optimiser": OPTIMISERS, "schedule": SCHEDULES})
        self._check_choices({"precision": ("fp32", "bf16"), "backend": backends})
        self._check_shares("beta1", "beta2")
        least = ("weight_decay", "clip", "warmup", "decay", "seed", "split_seed", "eval_every")
        self._check_least(0, *least, "checkpoint_every")
        above = ("steps", "epochs", "accumulate", "lr", "epsilon", "threads", "log_every")
        self._check_least(1, *above, "keep_last")
        seeds = dict.fromkeys(("seed", "split_seed"), 2**63 - 1)
        self._check_most({**seeds, "threads": 1024, "epochs": 10_000})
        self._check_used(
            self.schedule == "wsd",
            f"schedule is {self.schedule}, not wsd, whose fall it is",
            "decay",
        )

    @property
    def warmup_steps(self) -> int:
        """The steps of warm-up of a run whose number of steps is known."""
        return self._part_of_steps(self.warmup)

    @property
    def decay_steps(self) -> int:
        """The steps of wsd's fall of a run whose number of steps is known."""
        return self._part_of_steps(self.decay)

    def _part_of_steps(self, part: float) -> int:
        assert self.steps is not None
        return round(part * self.steps) if part < 1 else round(part)

    def batches_of(self, step: int) -> int:
        """The number of batches that make optimiser step `step`, counted from 0."""
        return self.accumulate


def scheduled(config: Training, batches: int, shards: int = 1) -> Training:
    """The settings with the number of steps, and an evaluation and a checkpoint an epoch where they are left open.

    `batches` is the number of them in an epoch; a step takes `accumulate` from each of `shards` parts of the data.
    """
    steps = config.steps
    if steps is None:
        assert config.epochs is not None
        steps = max(math.ceil(config.epochs * batches / shards / config.accumulate), 1)
    epoch = max(round(batches / shards / config.accumulate), 1)
    return dataclasses.replace(
        config,
        steps=steps,
        eval_every=config.eval_every or epoch,
        checkpoint_every=config.checkpoint_every or epoch,
    )


def check_length_said(settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless one setting gives the length; a recorded run has steps and the one they follow from."""
    given = [name for name in LENGTHS if settings.get(name) is not None]
    if not given:
        raise ValueError("how long to train is not said: pass one of steps, epochs and minutes")
    if len(given) > 1 and "steps" not in given:
        raise ValueError("epochs and minutes are both set: pass one of them")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the setting's type: ints become floats, paths strings, one string a list; others raise TypeError."""
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
        with contextlib.suppress(OverflowError):
            value = float(value)
    if isinstance(value, str) and float in kinds and str not in kinds:
        # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    kind = next(k for k in kinds if k is not type(None))
    if type(value) is not kind:
        wanted = "list of strings" if typing.get_origin(kind) is list else kind.__name__
        raise TypeError(f"{name} is {quoted(value)}: it must be a {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: it must be finite")
    return value


def load_settings(path: str | Path, kind: type[Settings]) -> dict[str, Any]:
    """Read the settings of `kind` in a .toml, .yaml or .yml file.

    Raises FileNotFoundError, or ValueError for a file that can't be read or that has a name that is no setting.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        values = _parse(path)
    except (ValueError, RecursionError) as error:
        reason = shortened(" ".join(str(error).split()), 300)
        raise ValueError(f"{path} can't be read: {reason}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings: write lines such as `lr = 1e-4`")
    names = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
            raise ValueError(
                f"{path}: there is no setting {quoted(name)}: did you mean {quoted(near[0])}?"
            )
    return values


def _parse(path: Path) -> Any:
    text = "\n".join(read_lines(path))
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
    raise ValueError(
        f"its suffix is {quoted(path.suffix)}, and a configuration is .toml, .yaml or .yml"
    )


def check_unused(out: Path) -> None:
    """Raise FileExistsError for the folder of a run."""
    if (out / "config.toml").exists():
        raise FileExistsError(
            f"{out} already holds a run: go on with --resume, or choose another --out"
        )


def recorded(out: Path, given: Mapping[str, Any], kind: type[Config]) -> Config:
    """The recorded settings of the run in `out`, with the given ones that change no loss.

    Raises FileNotFoundError where there is no run, and ValueError, naming what differs, for any other difference.
    """
    if not (out / "config.toml").exists():
        raise FileNotFoundError(f"{out} holds no run to resume: start one without --resume")
    config = kind(**with_whole_paths(load_settings(out / "config.toml", kind), kind))
    # a setting that is left open agrees with whatever value the run has found for it
    zeros = [f.name for f in dataclasses.fields(kind) if f.metadata["zero_is_open"]]
    given = {n: v for n, v in given.items() if v is not None and (v or n not in zeros)}
    if differences := config.differences(with_whole_paths(given, kind)):
        found = shortened("; ".join(differences), 400)
        raise ValueError(f"the run can't be resumed with other settings: {found}")
    return dataclasses.replace(config, **{name: given[name] for name in FREE if name in given})


def with_whole_paths(given: Mapping[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """The settings with absolute paths, which a resumption from another folder finds too; - is standard input."""

    def whole(path: str | Path) -> str:
        return "-" if str(path) == "-" else str(Path(path).absolute())

    found = dict(given)
    for f in dataclasses.fields(kind):
        name, is_path = f.name, f.metadata["path"]
        value = found.get(name)
        if not is_path or (callable(is_path) and value is not None and not is_path(str(value))):
            continue
        if isinstance(value, (list, tuple)):
            found[name] = [whole(path) for path in value]
        elif value is not None:
            found[name] = whole(value)
    return found


def merge(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file and of flags, which win; a flag for the length replaces the file's whole length."""
    settings = dict(file)
    for group in (LENGTHS, ("max_tokens", "batch_size")):
        if any(name in flags for name in group):
            settings = {k: v for k, v in settings.items() if k not in group}
    return {**settings, **flags}
