"""``kernelgraft convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console, count_bytes, escape


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A quantized model directory, or a .pt file of llm-awq.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; it appears whole or not at all.")],
    to: Annotated[str, typer.Option(help="awq (AutoAWQ GEMM), compressed-tensors, kernelgraft, qoq or qserve.")],
    source_format: Annotated[
        str | None, typer.Option("--from", help="llm-awq or qserve, for files that do not say what they are.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Directory of config.json and the tokenizer. Default: the one that IN is or lies in."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=-1, help="What IN was quantized with; with --from. QServe's files tell.")
    ] = None,
    s2_order: Annotated[
        str | None,
        typer.Option(help="qserve or deepcompressor: whose order the scales of groups have; with --from qserve."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Write a quantized checkpoint in another format. Weights stay bit for bit what they are.

    Reads AutoAWQ GEMM, GEMV and GEMV_FAST, llm-awq, compressed-tensors W4A16 and kernelgraft's own. Of weights for
    8-bit activations, reads and writes qoq and qserve.

    Examples:

    [bold]kernelgraft convert ./llama-awq ./llama-ct --to compressed-tensors[/]

    [bold]kernelgraft convert ./llama-gemv ./llama-awq --to awq[/]

    [bold]kernelgraft convert vicuna-v2.pt ./vicuna-awq --to awq --from llm-awq --config ./vicuna --group-size 128[/]

    [bold]kernelgraft convert ./Llama-3-8B-QServe ./llama-qoq --to qoq[/]
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from kernelgraft_transformers.convert import convert_checkpoint

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=None)
        result = convert_checkpoint(
            source,
            out,
            to,
            source_format=source_format,
            config=config,
            group_size=group_size,
            s2_order=s2_order,
            overwrite=overwrite,
            on_tensor=lambda _, done, total: progress.update(task, completed=done, total=total),
        )
    if result.rounded:
        console(stderr=True).print(
            f"scales of {len(result.rounded)} layers were not float16 and lost bits, "
            f"{escape(result.rounded[0])} the first"
        )
    console().print(
        f"[green]wrote[/] {escape(out)}: {result.layers} layers from {escape(result.source)} to "
        f"{escape(result.target)}, {count_bytes(result.bytes)}"
    )
