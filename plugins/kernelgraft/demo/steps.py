"""Progress of long work: a bar while a step runs, a line with its time when it is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

Report = Callable[..., None]
"""``report(done, total, detail="")`` moves the bar of the running step."""


class Steps:
    """Shows steps on a console and remembers how long each took.

    Attributes:
        taken: ``(title, seconds)`` of the steps that are done.
    """

    def __init__(self, console: Any) -> None:
        self._console = console
        self.taken: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Report]:
        """Time a block, under a title; yields the function that reports progress."""
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        started = time.perf_counter()
        shown = escape(title)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
        silent = not self._console.is_terminal
        with Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True, disable=silent) as progress:
            task = progress.add_task(shown, total=None)

            def report(done: int, total: int, detail: str = "") -> None:
                text = f"{shown} [dim]{escape(detail)}[/]" if detail else shown
                progress.update(task, completed=done, total=total, description=text)

            try:
                yield report
            except BaseException:
                self._console.print(f"[red]✗[/] {shown}")
                raise
        seconds = time.perf_counter() - started
        self.taken.append((title, seconds))
        self._console.print(f"[green]✓[/] {shown} [dim]{seconds:.1f} s[/]")
