"""What a section of the demo is given and what it gives back, and the list of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .steps import Steps

NAMES = ("awq", "qoq", "mmcv")
"""Plugins that have a section, in the report's order. Each is a module of this package that holds ``SECTION``."""


@dataclass(frozen=True)
class Text:
    """A text, what messages and the report call it, and the file that holds it, None before there is one."""

    name: str
    content: str
    path: Path | None = None


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        windows: perplexity windows; samples: calibration samples; both of ``length`` tokens.
        new_tokens: generated to measure speed, in each of ``rounds`` rounds.
    """

    windows: int
    samples: int
    length: int
    new_tokens: int
    rounds: int


FULL = Effort(windows=16, samples=32, length=512, new_tokens=64, rounds=3)
FAST = Effort(windows=2, samples=2, length=128, new_tokens=8, rounds=1)


@dataclass(frozen=True)
class Context:
    """What a section works with.

    Attributes:
        calibration, measured: disjoint texts; what is measured is never calibrated on.
        work: an empty folder for this section's files, gone afterwards unless the user keeps it.
        logs: where the output of hosts goes.
        model: a model directory to use instead of the section's own.
        engine: ``"auto"``, or the host the user wants.
        device: ``"cpu"`` or ``"cuda"``.
    """

    steps: Steps
    effort: Effort
    calibration: Text
    measured: Text
    work: Path
    logs: Path
    device: str
    model: Path | None = None
    engine: str = "auto"


@dataclass(frozen=True)
class Table:
    """Rows of text under columns of text; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A drawing as a whole SVG document; ``alt`` says in words what it shows."""

    title: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Dialogue:
    """One question and what each of several models answered, by the model's name."""

    question: str
    answers: dict[str, str]


@dataclass(frozen=True)
class SectionResult:
    """What a section found.

    Attributes:
        verdict: the outcome in a sentence, with its numbers.
        notes: what a reader has to know to judge the numbers, hosts that were missing included.
        commands: what to type to get the same without the demo.
        data: every number behind the table and the figures, for JSON.
        failures: what did not work, a sentence each; the rest is valid all the same.
    """

    verdict: str
    table: Table
    figures: tuple[Figure, ...] = ()
    dialogues: tuple[Dialogue, ...] = ()
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A plugin's part of the demo. ``run`` raises what its libraries raise; the other sections go on.

    ``needs``: modules without which a demo of everything leaves the section out.
    """

    name: str
    title: str
    run: Callable[[Context], SectionResult]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Those that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def find_section(name: str) -> Section:
    """The section of a plugin; dashes or underscores.

    Raises:
        ValueError: it has none; the message lists those that do.
    """
    known = name.replace("_", "-")
    if known not in NAMES:
        raise ValueError(f"the demo has no section {name!r}; it has {', '.join(NAMES)}")
    section: Section = importlib.import_module(f".{known.replace('-', '_')}", __package__).SECTION
    return section
