"""Session: what a training of any kind needs around its steps, from the checks of OUT to the folder of its model."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from fastbert.backend import chooser, tuned
from fastbert.data import save_tokenizer
from fastbert.files import quoted
from fastbert.machine import machine_info
from fastbert.train import store
from fastbert.train.settings import (
    FREE,
    TrainingSettings,
    check_unused,
    recorded,
    with_whole_paths,
)
from fastbert.train.world import World, joined

# the name of the ops' backends in a run's identity
BACKENDS = "the backend of each op"

Config = TypeVar("Config", bound=TrainingSettings)


class Session(Generic[Config]):
    """The surroundings of one training: its folder, settings, processes, threads, backend, seeds and records.

    A kind of training uses it as

        with Session(Config, config, out, resume=resume, check=check) as s:
            model = s.model(build)        # drawn from the seed, on the device
            s.begin(model, schedule)      # about.json, then config.toml: from here on OUT holds a run
            TaskRun(trainer, s).train()   # goes on from the newest checkpoint with `resume`
            s.export(model, tokenizer)    # OUT/model

    Entering it raises ValueError, TypeError or OSError for settings or a folder that can't be used; nothing is written
    then. Where such an error, or an IndexError, leaves the block before `begin` has recorded a new run, what was
    written to OUT in the block is removed. `check` makes the task's own checks that need no data. `config` may be None
    with `resume`: OUT has the settings.

    Where the settings have `shards`, the processes that torchrun has started train one model together, and the main
    process alone writes and reports.
    """

    # the settings, filled in from the machine, and the processes; both are there inside the block only
    config: Config
    world: World

    def __init__(
        self,
        kind: type[Config],
        config: Config | None,
        out: str | Path,
        *,
        resume: bool = False,
        quiet: bool = False,
        say: Callable[[str], None] | None = None,
        check: Callable[[Config], None] | None = None,
    ) -> None:
        self.kind = kind
        self.out = Path(out)
        self.resume = resume
        self.quiet = quiet
        self.say = say or _silent
        self._given = config
        self._check = check
        # whether OUT holds the run
        self._begun = resume

    def __enter__(self) -> Session[Config]:
        self._block = self._entered()
        self._block.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._block.__exit__(kind, error, traceback)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        processes: AbstractContextManager[World] = (
            joined(torch.cuda.is_available()) if _divisible(self.kind) else nullcontext(World())
        )
        with processes as world:
            config = _filled_in(self._checked())
            self.config, self.world = _divided(config, world, self.resume)
            if not self.resume:
                _check_writable(self.out)
            if not world.main:
                self.say = _silent
            # every process has looked at OUT before the main one writes to it
            world.meet()
            with (
                locked(self.out) if world.main else nullcontext(),
                _threads(self.config.threads),
                chooser.use(self.config.backend) if self.config.backend else nullcontext(),
                self._tidied() if world.main else nullcontext(),
            ):
                yield
                # a process that ended before the others would look lost to them
                world.meet()

    @contextmanager
    def _tidied(self) -> Iterator[None]:
        """Remove what was written to OUT inside the block if the run is refused before it begins."""
        before = {*self.out.iterdir()}
        try:
            yield
        except (ValueError, TypeError, IndexError, OSError):
            for path in () if self._begun else {*self.out.iterdir()} - before:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            raise

    def _checked(self) -> Config:
        """The settings as they are given or recorded, after the checks that need no data."""
        config = self._given
        if self.resume:
            return recorded(self.out, {} if config is None else config.to_dict(), self.kind)
        if config is None:
            raise TypeError("config is None: only a run that is resumed has its settings in OUT")
        check_unused(self.out)
        if self._check is not None:
            self._check(config)
        return config

    def model(self, build: Callable[[], Any]) -> Any:
        """The model that `build` makes from the seed, on this process's device.

        All processes start from the same weights; each one then draws dropout masks of its own.
        """
        config, rank = self.config, self.world.rank
        _seed_all(config.seed)
        if self.device.startswith("cuda:"):
            # libraries of several GPUs go by the current one
            torch.cuda.set_device(self.device)
        model = build().to(self.device)
        if rank:
            _seed_all((config.seed + 1_000_003 * rank) % 2**63)
        if config.recompute:
            model.gradient_checkpointing_enable()
        return model

    def begin(
        self,
        model: torch.nn.Module,
        schedule: Callable[[], Config],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a new run; a resumed one is recorded already.

        `schedule` gives the settings with the number of steps; it is called when the disk is known to have room.
        about.json holds machine, versions and backends, and what `about` adds. config.toml is written last.
        """
        if self.resume:
            return
        _check_space(model, self.config, self.out)
        self.config = schedule()
        if self.world.main:
            facts = {"machine": machine_info(), "backends": backends(self.device)}
            store.write_json(self.out / "about.json", {**facts, **(about or {})})
            # a folder with this file holds a run that can be resumed
            store.write_text(self.out / "config.toml", self.config.to_toml())
        self._begun = True

    def identity(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """What must be the same when the run is resumed: its settings, its `data` and the backend of each op."""
        settings = {k: v for k, v in self.config.to_dict().items() if k not in FREE}
        return {**settings, **data, BACKENDS: backends(self.device)}

    @property
    def device(self) -> str:
        """The device of this process."""
        assert self.config.device is not None
        return self.world.device(self.config.device)

    @property
    def model_folder(self) -> Path:
        """The folder that `export` writes, in Hugging Face's layout."""
        return self.out / "model"

    def export(self, model: Any, tokenizer: Any, *more: Callable[[Path], None]) -> None:
        """Write the model with its tokenizer, and what `more` writes beside them, in place of an earlier one."""

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
            for write in more:
                write(folder)

        if self.world.main:
            store.write_folder(self.model_folder, fill)


def backends(device: str) -> dict[str, str]:
    """The backend that each op runs on: the forced one, else the tuned one, else the first in order that works here."""
    kind, name = torch.device(device).type, chooser.forced()
    found = {
        slug: name or next(n for n in chooser.order(kind) if reasons[n] is None)
        for slug, reasons in chooser.matrix().items()
    }
    winners = {} if name else tuned.winners(chooser.tuned_tables, kind)
    return {**found, **winners}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast, or a context that changes nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the folder of a run against a second process; raises FileExistsError where one has it.

    The system gives the lock back when the process ends, however that comes. No lock file is left. A folder in which
    nothing was written is removed at the end.
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
        # rmdir refuses a folder that holds something
        with suppress(OSError):
            out.rmdir()
        os.close(handle)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads inside the block."""
    assert count is not None
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_writable(out: Path) -> None:
    """Make the folder of a run; raises OSError where nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # a file without a name can't collide with that of another process
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"--out {out} can't be written to: {error}") from error


def _check_space(model: torch.nn.Module, config: TrainingSettings, out: Path) -> None:
    """Refuse to start when the disk can't hold the run's checkpoints and its model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # a checkpoint holds the weights and two moments; while a new one is written there is one more than is kept
    needed = weights * (3 * (config.keep_last + 1) + 1)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(
            f"{out} has {free / 1e9:.2f} GB free and the run needs {needed / 1e9:.2f} GB for {config.keep_last} "
            "checkpoints: free some space or lower keep_last"
        )


def _filled_in(config: Config) -> Config:
    """The settings with what they leave to the machine, so that a resumption finds the same, and with whole paths."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {quoted(device)} can't be used: {str(error).splitlines()[0]}"
        ) from error
    backend = config.backend or chooser.forced()
    if backend and (reason := chooser.why_not_on(backend, torch.device(device).type)):
        raise ValueError(f"backend {quoted(backend)} can't be used: {reason}")
    found = {
        "device": device,
        "threads": config.threads or torch.get_num_threads(),
        "backend": backend,
    }
    return replace(config, **with_whole_paths({**config.to_dict(), **found}, type(config)))


def _divisible(kind: type[TrainingSettings]) -> bool:
    """Whether several processes can share a training with settings of this class."""
    return "shards" in {f.name for f in fields(kind)}


def _divided(config: Any, world: World, resume: bool) -> tuple[Any, World]:
    """The settings and the world with the number of parts that a step's data has: as many for each process."""
    if not _divisible(type(config)):
        return config, world
    # a run that was recorded before there were parts has one
    shards = (config.shards or 1) if resume else (config.shards or world.size)
    if shards % world.size:
        raise ValueError(
            f"the data of a step has {shards} parts and there are {world.size} processes: start a number that "
            "divides it, or a run with another number of shards"
        )
    strategy = config.strategy if hasattr(config, "strategy") else world.strategy
    return replace(config, shards=shards), replace(world, shards=shards, strategy=strategy)


def _seed_all(seed: int) -> None:
    """Seed the generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 -- libraries may draw from the global generator


def _silent(text: str) -> None:
    """Say nothing."""
