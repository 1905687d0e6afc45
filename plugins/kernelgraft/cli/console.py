"""What the commands print with."""

from __future__ import annotations

from typing import Any


def console(*, stderr: bool = False) -> Any:
    """Progress goes to stderr, results to stdout, so that a pipe gets the results alone."""
    from rich.console import Console

    return Console(highlight=False, stderr=stderr)


def table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def escape(value: object) -> str:
    """Square brackets in what we report are no markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(str(value))


def count_bytes(count: float) -> str:
    """``123456789`` as ``117.7 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
