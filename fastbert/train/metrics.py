"""A run's metrics: a line of JSON per log step in metrics.jsonl, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from fastbert.files import split_lines

_log = logging.getLogger("fastbert")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl as dicts; a last line that a kill has cut short is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    # a line is whole once its newline is there
    return [json.loads(line) for line in split_lines(text.rpartition("\n")[0])]


class Metrics:
    """Appends to OUT/metrics.jsonl and OUT/tensorboard; lines that a run resumed at `step` writes again are dropped.

    `size` is the length of metrics.jsonl at that step's checkpoint. A process that is not `main` writes nothing.
    """

    def __init__(self, out: Path, step: int = 0, size: int = 0, main: bool = True) -> None:
        self._main = main
        if not main:
            return
        self._file = open(out / "metrics.jsonl", "ab")  # noqa: SIM115 -- closed by close()
        self._file.truncate(min(size, self._file.tell()))
        self._board = _board(out / "tensorboard", step)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add one line; `kind` is train or eval."""
        if not self._main:
            return
        line = json.dumps({"kind": kind, "step": step, **values}) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> int:
        """Put the lines on the disk before a checkpoint records their length, which is returned."""
        if not self._main:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file and TensorBoard's writer."""
        if not self._main:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning("no TensorBoard log: pip install tensorboard to have one")
        return None
    # TensorBoard hides the events after the step at which the run is resumed
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


# of a 95 % interval
_Z = 1.959963984540054


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927); (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    p, z2 = right / total, _Z * _Z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    spread = _Z / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    return max(centre - spread, 0.0), min(centre + spread, 1.0)
