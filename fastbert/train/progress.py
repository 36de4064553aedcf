"""What a run shows while it trains: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}"


class Progress:
    """Steps done, loss, tokens/s and the time left, on standard error; nothing at all where `quiet`."""

    def __init__(self, steps: int, done: int = 0, quiet: bool = False) -> None:
        from rich.console import Console

        self.console: Console = Console(stderr=True, quiet=quiet, highlight=False)
        self.steps = steps
        # what may end the run sooner; the time left is then the most that it takes
        self.goal = ""
        self._bar: Bar | None = _bar(self.console) if self.console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task(
                "train", total=steps, completed=done, loss="", speed="", left="left"
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show the bar at this step; plain output has lines from `log` alone."""
        if self._bar is not None:
            fields: dict[str, Any] = {"loss": f"{loss:.3f}", "speed": f"{tokens_per_s:,.0f}"}
            if self.goal:
                fields |= {"description": self.goal, "left": "at most"}
            self._bar.update(self._task, completed=step, **fields)

    def log(self, step: int, values: dict[str, float], seconds_left: float) -> None:
        """Write the plain line of a log step; the bar has shown it already."""
        if self._bar is None:
            left = f"{duration(seconds_left)} left"
            if self.goal:
                left = f"{self.goal}, at most {duration(seconds_left)}"
            self.say(
                f"step {step}/{self.steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
                f"{values['tokens_per_s']:,.0f} tokens/s  {left}"
            )

    def say(self, text: str) -> None:
        """Write a line of text, above the bar where there is one."""
        self.console.print(text, markup=False, soft_wrap=True)


def _bar(console: Console) -> Bar:
    from rich import progress as p

    columns: list[Any] = [
        p.TextColumn("[bold]{task.description}"),
        p.BarColumn(),
        p.MofNCompleteColumn(),
        p.TextColumn("loss [bold]{task.fields[loss]}"),
        p.TextColumn("{task.fields[speed]} tokens/s"),
        p.TimeElapsedColumn(),
        p.TextColumn("{task.fields[left]}"),
        p.TimeRemainingColumn(),
    ]
    return p.Progress(*columns, console=console, refresh_per_second=4)
