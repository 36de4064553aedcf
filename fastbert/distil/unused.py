"""Settings that a distillation has no use for, by its data, its losses and its student."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastbert.distil.config import RECURRENT, DistilConfig, has_sizes
from fastbert.distil.plan import UNJUDGED
from fastbert.files import quoted

_LEAVE = "leave it out"
_OF_TEXT = dict.fromkeys(("separator", "mask_prob", "data_dir", "eval_tokens"), _LEAVE) | {
    "max_tokens": "pass batch_size"
}
# {kind of data: {setting without use: remedy}}
_BY_KIND = {
    "text": {"validation": "say heldout", "test": _LEAVE, "metric": _LEAVE, "replaced": _LEAVE},
    "labelled": {"field": "name the columns as in the teacher's training", **_OF_TEXT},
    "sentences": {"metric": _LEAVE, "replaced": _LEAVE, **_OF_TEXT},
}
# {setting: the loss that reads it}
_BY_LOSS = {"temperature": "soft", "teacher_layer": "relations", "relation_heads": "relations"}


def check_used(config: DistilConfig, kind: str, losses: set[str], has_validation: bool) -> None:
    """Raise ValueError for a setting that is not at its default and that the run would not use."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    changed = {
        name: quoted(value)
        for name, default in defaults.items()
        if (value := getattr(config, name)) != default
    }
    for name, remedy in _BY_KIND[kind].items():
        if name in changed:
            raise ValueError(f"{name} is {changed[name]}: {remedy}, the data is {kind}")
    if kind != "text" and any(Path(source).name == "-" for source in config.sources):
        raise ValueError(f"sources is -, standard input: name a file, the data is {kind}")
    for name, loss in _BY_LOSS.items():
        if name in changed and loss not in losses:
            raise ValueError(
                f"{name} is {changed[name]} and losses has no {loss}: leave one out, or add the other"
            )
    if config.int8 and losses == {"labels"}:
        raise ValueError("int8 is set and losses is labels, which reads no teacher: leave int8 out")
    if config.replaced and losses == {"labels"}:
        raise ValueError(
            f"replaced is {config.replaced} and losses is labels: the data has no labels of other texts; leave it out, "
            "or add soft"
        )
    if config.patience and losses <= UNJUDGED:
        raise ValueError(
            f"patience is {config.patience} and no evaluation judges {' and '.join(sorted(losses))}: leave it out"
        )
    for name in ("heldout", "split_seed"):
        if has_validation and name in changed:
            raise ValueError(
                f"{name} is {changed[name]} and validation is given: leave one of them out"
            )
    if kind != "text" and config.heldout == 0 and not has_validation:
        raise ValueError("heldout is 0 and there is no validation: pass one of them")
    _check_start(config)


def _check_start(config: DistilConfig) -> None:
    assert config.student is not None
    for name in ("layers", "attention_dropout"):
        if config.student.startswith(RECURRENT) and getattr(config, name) is not None:
            raise ValueError(
                f"{name} is {quoted(getattr(config, name))} and the student is an LSTM, which has no such layers: "
                "leave it out"
            )
    if config.layers is not None and config.start == "fresh":
        raise ValueError(
            f"layers is {quoted(config.layers)} and start is fresh: leave one of them out"
        )
    if not has_sizes(config.student) and (config.layers is not None or config.start == "fresh"):
        raise ValueError(
            f"layers or start is set and the student is the model in {config.student}, whose weights are trained "
            "further: leave them out, or pass the student's sizes"
        )
