"""A bar for the steps of a compression, on standard error."""

from __future__ import annotations


class Bar:
    """Steps done and the time left, with the name of the present part; without a terminal a line for each part."""

    def __init__(self, steps: int, quiet: bool = False) -> None:
        from rich import progress as p
        from rich.console import Console

        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        columns = (
            p.TextColumn("[bold]{task.description}"),
            p.BarColumn(),
            p.TimeElapsedColumn(),
            p.TextColumn("left"),
            p.TimeRemainingColumn(),
        )
        disable = quiet or not self._console.is_terminal
        self._bar = p.Progress(*columns, console=self._console, disable=disable)
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def begin(self, part: str) -> None:
        """Name the part that begins."""
        self._bar.update(self._task, description=part)
        if self._bar.disable:
            self._console.print(part, markup=False)

    def advance(self, steps: int = 1) -> None:
        """Some steps are done."""
        self._bar.advance(self._task, steps)
