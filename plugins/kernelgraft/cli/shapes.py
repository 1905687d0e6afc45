"""Shapes as users write them."""

from __future__ import annotations

import typer


def parse_features(text: str) -> tuple[int, int]:
    """``"4096x11008"`` as (output, input) features. Raises typer.BadParameter for what is no shape."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not output x input features, e.g. 4096x11008", param_hint="--shape")
    return int(parts[0]), int(parts[1])


def check_positive(numbers: list[int], option: str) -> list[int]:
    """Raises typer.BadParameter for a number below 1."""
    for number in numbers:
        if number < 1:
            raise typer.BadParameter(f"{number} is not 1 or more", param_hint=option)
    return numbers
