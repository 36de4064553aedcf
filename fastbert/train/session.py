"""What runs of every kind share: their folder, threads, seeds, backends, the manifest, and how one is resumed."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fastbert.backend import chooser, tuned
from fastbert.machine import machine_info
from fastbert.train.settings import FREE, TrainingSettings, load_settings

Config = TypeVar("Config", bound=TrainingSettings)


def writable(out: Path) -> None:
    """Make the folder of a run; raises OSError where nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # without a name that another process of the run might take
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"--out {out} can't be written to: {error}") from error


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder of a run; the lock goes with the process, however that ends, and leaves no file.

    A folder in which nothing was written goes too.
    """
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FileExistsError(
            f"another process is training in {out}: wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        # only an empty one can be removed
        with suppress(OSError):
            out.rmdir()
        os.close(handle)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads inside the block."""
    assert count is not None
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forced(name: str | None) -> AbstractContextManager[Any]:
    """Force a backend inside the block; None forces nothing."""
    return chooser.use(name) if name else nullcontext()


def seed_all(seed: int) -> None:
    """Seed the generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 -- libraries may draw from the global generator


def backends(device: str) -> dict[str, str]:
    """The first backend in each op's order on a device that this machine has, or the one in force by name.

    With what fastbert.tune() has found for the device, which comes before the order.
    """
    kind, name = torch.device(device).type, chooser.forced()
    found = {
        slug: name or next(n for n in chooser.order(kind) if reasons[n] is None)
        for slug, reasons in chooser.matrix().items()
    }
    winners = {} if name else tuned.winners(chooser.tuned_tables, kind)
    return {**found, **winners}


def check_space(model: torch.nn.Module, config: TrainingSettings, out: Path) -> None:
    """Refuse to start when the disk can't hold the run's checkpoints and its model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # a checkpoint holds the weights and two moments; one more than is kept exists while it is written
    needed = weights * (3 * (config.keep_last + 1) + 1)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(
            f"{out} has {free / 1e9:.2f} GB free and the run needs {needed / 1e9:.2f} GB for {config.keep_last} "
            "checkpoints: free some space or lower keep_last"
        )


def about(config: TrainingSettings) -> dict[str, Any]:
    """The manifest of a run: machine, versions, the backend of each op."""
    return {"machine": machine_info(), "backends": backends(config.device or "cpu")}


def settled(config: Config) -> Config:
    """The settings with what was left to the machine filled in, so that a resumption finds the same."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} can't be used: {str(error).splitlines()[0]}"
        ) from error
    return replace(
        config,
        device=device,
        threads=config.threads or torch.get_num_threads(),
        backend=config.backend or chooser.forced(),
    )


def recorded(out: Path, given: Mapping[str, Any], kind: type[Config]) -> Config:
    """The recorded settings of the run in `out`, with the given ones that change no loss.

    Raises FileNotFoundError where there is no run, and ValueError, naming what differs, for any other difference.
    """
    if not (out / "config.toml").exists():
        raise FileNotFoundError(f"{out} holds no run to resume: start one without --resume")
    config = kind(**load_settings(out / "config.toml", kind))
    # what the run found out by itself is not contradicted by leaving it open
    given = {name: value for name, value in given.items() if value is not None}
    if differences := config.differences(given):
        raise ValueError(f"the run can't be resumed with other settings: {'; '.join(differences)}")
    return replace(config, **{name: given[name] for name in FREE if name in given})


def fresh(out: Path) -> None:
    """Raise FileExistsError where `out` holds a run already."""
    if (out / "config.toml").exists():
        raise FileExistsError(
            f"{out} already holds a run: go on with --resume, or choose another --out"
        )


def silent(text: str) -> None:
    """Say nothing."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast, or a context that changes nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
