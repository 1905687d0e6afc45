"""Which text calibrates and which is measured: never the same."""

from __future__ import annotations

from pathlib import Path

from kernelgraft.cli.builtin_text import BUILT_IN_TEXT, built_in_halves

from .sections import Text


def choose_texts(measured: Path | None, calibration: Path | None) -> tuple[Text, Text]:
    """The calibration text and the text to measure on.

    What no file is given for comes from Python's own documentation: its first half calibrates, its second is measured.

    Raises:
        ValueError: a file is empty or no text, or one of the two texts holds the other; OSError: a file cannot be read.
    """
    first, second = built_in_halves()
    calibrate = _read(calibration) or Text(f"{BUILT_IN_TEXT}, first half", first)
    measure = _read(measured) or Text(f"{BUILT_IN_TEXT}, second half", second)
    small, large = sorted((calibrate.content.strip(), measure.content.strip()), key=len)
    if small in large:
        raise ValueError(
            f"{calibrate.name} and {measure.name} hold the same text: what calibrates must not be measured on"
        )
    return calibrate, measure


def _read(path: Path | None) -> Text | None:
    from kernelgraft_transformers.texts import read_text

    return None if path is None else Text(str(path), read_text(path), path)
