"""``report.html`` and ``demo.json``: what a run found, for people and for programs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from kernelgraft import templates

from .files import write_whole
from .runner import Outcome, Run
from .sections import FAST

SCHEMA = 1
SHOWN = (
    "kernelgraft",
    "torch",
    "triton",
    "numba",
    "transformers",
    "vllm",
    "python",
    "cpu",
    "cores",
    "threads",
    "gpu",
    "load",
)


def write_reports(run: Run) -> Path:
    """Write both files into the run's folder, each in one step, and give the path of the HTML file."""
    out = run.request.out
    write_whole(out / "demo.json", json.dumps(as_data(run), indent=1) + "\n")
    write_whole(out / "report.html", render(run))
    return out / "report.html"


def as_data(run: Run) -> dict[str, Any]:
    """The whole run as plain data; figures are left out, the numbers behind them are in ``data``."""
    return {
        "schema": SCHEMA,
        "environment": run.environment,
        "command": command_line(run),
        "seconds": round(run.seconds, 1),
        "sections": {outcome.section.name: _section_data(outcome) for outcome in run.outcomes},
    }


def render(run: Run) -> str:
    """The run as one HTML page."""
    machine = {name: run.environment[name] for name in SHOWN if run.environment[name] is not None}
    return templates.render("demo", run=run, machine=machine, command=command_line(run))


def command_line(run: Run) -> str:
    """What to type to get this run again."""
    asked = run.request
    words = ["kernelgraft", "demo"]
    for option, value in (("--text", asked.text), ("--calib", asked.calibration), ("--model", asked.model)):
        words += [option, str(value)] if value is not None else []
    for name in asked.only:
        words += ["--only", name]
    words += ["--engine", asked.engine] if asked.engine != "auto" else []
    words += ["--out", str(asked.out)] if str(asked.out) != "out" else []
    words += [option for option, on in (("--keep", asked.keep), ("--fast", asked.effort == FAST)) if on]
    return shlex.join(words)


def _section_data(outcome: Outcome) -> dict[str, Any]:
    result = outcome.result
    return {
        "title": outcome.section.title,
        "seconds": round(outcome.seconds, 1),
        "steps": [{"title": title, "seconds": round(seconds, 2)} for title, seconds in outcome.steps],
        "failures": list(outcome.failures),
        "verdict": result.verdict if result else None,
        "notes": list(result.notes) if result else [],
        "data": result.data if result else {},
    }
