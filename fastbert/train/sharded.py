"""Checkpoints that several processes write together (torch.distributed.checkpoint) and any number of them reads."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from fastbert.files import UNFINISHED, sync_files, sync_folder
from fastbert.train.store import Checkpoints
from fastbert.train.world import World

# the parts of a state that are spread over the processes; the main process has the others
_SPREAD = ("model", "optimiser")


class ShardedCheckpoints(Checkpoints):
    """Checkpoints that are folders; a folder gets its name when it is whole.

    `present` gives the state that the run has now: a checkpoint is read into its tensors, however they are spread.
    """

    suffix = ""

    def __init__(
        self, folder: Path, keep: int, world: World, present: Callable[[], dict[str, Any]]
    ) -> None:
        super().__init__(folder, keep)
        self.world = world
        self.present = present

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write one, every process its part, then delete the oldest; raises OSError where it can't be written."""
        path = self.path(step)
        new = self.folder / f"{UNFINISHED}{path.name}"
        if self.world.main:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        self.world.meet()
        spread = {name: state[name] for name in _SPREAD}
        rest = {name: value for name, value in state.items() if name not in (*_SPREAD, "rng")}
        try:
            with _quiet():
                dcp.save(spread, checkpoint_id=new, no_dist=self.world.size == 1)
            torch.save(state["rng"], new / f"rng-{self.world.rank}.pt")
            if self.world.main:
                torch.save(rest, new / "run.pt")
        except (RuntimeError, dcp.api.CheckpointException) as error:
            raise OSError(f"{path} can't be written: {error}") from error
        self.world.meet()
        if self.world.main:
            _finish(new, path)
            for old in self.paths()[: -self.keep]:
                shutil.rmtree(old)
        self.world.meet()
        return path

    def _read(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint; where it lacks this process's generators, they stay as they are."""
        present = self.present()
        spread = {name: present[name] for name in _SPREAD}
        rest = torch.load(path / "run.pt", map_location="cpu", weights_only=True)
        with _quiet():
            dcp.load(spread, checkpoint_id=path, no_dist=self.world.size == 1)
        rng = path / f"rng-{self.world.rank}.pt"
        own = torch.load(rng, weights_only=True) if rng.exists() else present["rng"]
        return {**rest, **spread, "rng": own}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process writes or reads the checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _finish(new: Path, path: Path) -> None:
    """Give a whole checkpoint its name, after it has reached the disk."""
    sync_files(new)
    sync_folder(new)
    shutil.rmtree(path, ignore_errors=True)
    new.rename(path)
    sync_folder(path.parent)
