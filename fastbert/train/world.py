"""The processes that train one model together: the number of this one, and sums over all of them.

torchrun starts the processes and gives them an address to connect to; without torchrun there is one process. Sums of
numbers go through host memory (gloo), so that no GPU waits for them. DDP or FSDP2 exchange gradients (parallel.py).
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# parts of the libraries' messages when another process is gone; gloo's have the name of its source file
_GONE = ("gloo", "by peer", "Broken pipe")

# process groups that this process has left, kept until the program ends. Without the list a DDP object that outlives
# its group has the last reference to it: the group's destructor then holds the GIL and waits for gloo's thread, which
# needs the GIL to release a tensor (torch 2.13)
_left: list[dist.ProcessGroup | None] = []
atexit.register(_left.clear)


class PeerLost(RuntimeError):
    """Another process of the training has ended, and this one can't go on without it."""


@dataclass(frozen=True)
class World:
    """This process's number, how many there are, and the parts (`shards`) that the data of a step is divided into.

    Part j belongs to process j % size: a run that was started with as many processes as parts has the same batches, and
    at dropout 0 the same losses, on fewer processes.
    """

    rank: int = 0
    size: int = 1
    shards: int = 1
    # this process's number on its machine
    local: int = 0
    # how parallel.py spreads the model: ddp or fsdp
    strategy: str = "ddp"

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    @property
    def parts(self) -> range:
        """The parts of the data that are this process's own."""
        return range(self.rank, self.shards, self.size)

    def totals(self, *values: float) -> list[float]:
        """The sums over all processes of each value."""
        return self._reduced(list(values), dist.ReduceOp.SUM)

    def total(self, value: float) -> float:
        """The sum over all processes."""
        return self.totals(value)[0]

    def most(self, value: float) -> float:
        """The largest of all processes' values."""
        return self._reduced([value], dist.ReduceOp.MAX)[0]

    def meet(self) -> None:
        """Wait until every process has called this."""
        self.total(0.0)

    def device(self, name: str) -> str:
        """The device of this process: each process on a machine has a GPU of its own."""
        return f"cuda:{self.local}" if name == "cuda" and self.size > 1 else name

    def _reduced(self, values: list[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, how)
        return found.tolist()


@contextmanager
def joined(gpu: bool) -> Iterator[World]:
    """Connect the processes that torchrun has started, inside the block; without torchrun the World has one process.

    Raises PeerLost in place of the libraries' errors where another process has ended.
    """
    if not dist.is_torchelastic_launched():
        yield World()
        return
    # the processes first wait until the main one has tokenised the text
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=2))
    try:
        size = dist.get_world_size()
        yield World(dist.get_rank(), size, size, dist.get_node_local_rank(0))
    except RuntimeError as error:
        if any(sign in str(error) for sign in _GONE):
            raise PeerLost(
                "another process of this training has ended: its own message says why"
            ) from error
        raise
    finally:
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()
