"""``kernelgraft quantize``, ``kernelgraft inspect`` and ``kernelgraft ppl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kernelgraft.builtin import PLUGIN_OF_METHOD

from .builtin_text import BUILT_IN_TEXT, built_in_halves
from .console import console, count_bytes, escape, table


def quantize(
    model: Annotated[str, typer.Argument(help="Directory or hub name of the model to quantize.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it appears whole or not at all.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="awq, awq+gptq, gptq; qoq-g128, qoq-g64, qoq-chn (W4A8KV4); rtn (plain rounding, to compare with)."
        ),
    ] = "awq",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, a setting of the recipe, the value in JSON: rotate=false. Repeatable."),
    ] = None,
    bits: Annotated[int, typer.Option(help="4 or 3.")] = 4,
    group_size: Annotated[
        str, typer.Option(help="32, 64, 128, -1 (whole rows) or auto: the largest that divides every layer.")
    ] = "auto",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="No zero points.")] = False,
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="awq (AutoAWQ GEMM), compressed-tensors, kernelgraft or qoq. Default: awq; kernelgraft for 3 bits, "
            "qoq for its recipes.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--calib", help="Calibration text, UTF-8. Default: the first half of Python's own documentation."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--calib-images", help="Folder of pictures: for a vision model, each sample then shows one."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 64,
    length: Annotated[int, typer.Option("--seqlen", help="Tokens in a sample.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed that draws the samples.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: cuda where there is one.")] = "auto",
    offload: Annotated[
        bool, typer.Option("--offload-activations", help="Keep activations on disk instead of in memory.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML page with every layer's error and search curve.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Quantize a language model to 4 or 3 bits.

    Blocks are read and quantized one at a time. A run that was stopped goes on where it was when it is started again.
    Under torchrun every process calibrates on samples of its own.

    Examples:

    [bold]kernelgraft quantize ./SmolLM2-135M-Instruct --out ./SmolLM2-awq --calib text.txt --report report.html[/]

    [bold]kernelgraft quantize meta-llama/Llama-3.2-1B -o ./llama-int3 --bits 3 --group-size 64[/]

    [bold]torchrun --nproc-per-node 4 -m kernelgraft quantize ./Llama-3-8B -o ./llama-awq --samples 256[/]
    """
    from kernelgraft_transformers.checkpoint import check_replaceable
    from kernelgraft_transformers.images import draw_image_samples
    from kernelgraft_transformers.process_group import process_group
    from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
    from kernelgraft_transformers.texts import Calibration, read_text

    size, of_recipe = parse_group_size(group_size), parse_settings(settings or [])
    # Before minutes of work: what would be in the way at their end.
    check_replaceable(out, overwrite=overwrite)
    if report is not None:
        from kernelgraft.quantization_report import check_libraries

        check_libraries()
    content = built_in_halves()[0] if text is None else read_text(text)
    source = load_source(model)
    calibration = Calibration(samples, length, seed)
    with process_group(device) as place, BlockProgress(quiet=not place.leads) as progress:
        record = quantize_checkpoint(
            source,
            out,
            content,
            text_name=f"{BUILT_IN_TEXT}, first half" if text is None else str(text),
            recipe=recipe,
            bits=bits,
            group_size=size,
            symmetric=symmetric,
            layout=layout,
            settings=of_recipe,
            calibration=calibration,
            batches=None if images is None else draw_image_samples(source, images, content, calibration),
            device=place.device,
            offload=offload,
            overwrite=overwrite,
            on_block=progress.show,
        )
    if not place.leads:
        return
    console().print(
        f"[green]wrote[/] {escape(out)}: {recipe}, {record['bits']} bits, group size {record['group_size']}, "
        f"{record['seconds']:.0f} s"
    )
    if report is not None:
        from kernelgraft.quantization_report import write_report

        write_report(record, report)
        console().print(f"[green]wrote[/] {escape(report)}")


def inspect(
    directory: Annotated[Path, typer.Argument(help="A model directory.")],
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer's error.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a model directory holds and how it was quantized, without loading it.

    Example: [bold]kernelgraft inspect ./SmolLM2-awq --layers[/]
    """
    from kernelgraft_transformers.checkpoint import describe

    found = describe(directory)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = table("property", "value")
    quantization, layout = found["quantization_config"] or {}, found["layout"]
    for name, value in (
        ("model", f"{found['model_type']}, {found['layers']} layers, {found['dtype']}"),
        ("size", count_bytes(found["bytes"])),
        ("quantization", quantization.get("quant_method", "awq" if layout else "none")),  # old AutoAWQ does not say
        ("layout", f"{layout['format']}{', symmetric' if layout['symmetric'] else ''}" if layout else "-"),
        ("bits, group size", f"{layout['bits']}, {layout['group_size']}" if layout else "-"),
        ("quantized layers", found["quantized_layers"]),
    ):
        rows.add_row(name, escape(value))
    record = found["record"]
    if record:
        calibration = record["calibration"]
        rows.add_row("made by", escape(f"kernelgraft {record['kernelgraft']}, recipe {record['recipe']}"))
        rows.add_row("from", escape(record["source"]))
        rows.add_row(
            "calibration",
            escape(
                f"{calibration['samples']} x {calibration['length']} tokens of {calibration['text']}, "
                f"seed {calibration['seed']}, sha256 {calibration['sha256'][:12]}"
            ),
        )
        rows.add_row("time", f"{record['seconds']:.0f} s")
    console().print(rows)
    if layers:
        console().print(layer_table(record["layers"]) if record else "no errors are known: there is no record of ours")


def ppl(
    model: Annotated[str, typer.Argument(help="Directory or hub name, quantized or not.")],
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Text to predict, UTF-8. Default: the second half of Python's own documentation."),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    length: Annotated[int, typer.Option("--seqlen", help="Tokens in a window.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
) -> None:
    """Measure perplexity over disjoint windows of a text.

    AWQ and QoQ checkpoints run on kernelgraft's kernels.

    Example: [bold]kernelgraft ppl ./SmolLM2-awq --text wiki.test.raw --windows 64[/]
    """
    from rich.progress import Progress
    from transformers import AutoTokenizer

    import kernelgraft
    from kernelgraft_transformers.checkpoint import load_model, quantization_method
    from kernelgraft_transformers.texts import encode, perplexity, read_text

    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise typer.BadParameter(f"{dtype!r} is not float32, bfloat16, float16 or auto", param_hint="--dtype")
    content = built_in_halves()[1] if text is None else read_text(text)
    method = quantization_method(model)
    if method in PLUGIN_OF_METHOD:
        kernelgraft.load_plugin(PLUGIN_OF_METHOD[method])
    loaded = load_model(model, dtype)
    tokens = encode(AutoTokenizer.from_pretrained(model), content)
    with Progress(console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("perplexity", total=None)
        result = perplexity(
            loaded,
            tokens,
            window=length,
            windows=windows,
            on_window=lambda done, count, so_far: progress.update(
                task, total=count, completed=done, description=f"perplexity {so_far:.3f}"
            ),
        )
    print(f"{result:.4f}")


def parse_settings(given: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` each, the value in JSON. Raises typer.BadParameter for anything else."""
    settings: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE with a value in JSON", param_hint="--set") from None
    return settings


def parse_group_size(text: str) -> int | None:
    """``auto`` is None. Raises typer.BadParameter for what is no group size."""
    if text == "auto":
        return None
    if text not in ("-1", "32", "64", "128"):
        raise typer.BadParameter(f"{text!r} is not auto, 32, 64, 128 or -1", param_hint="--group-size")
    return int(text)


class BlockProgress:
    """A progress bar over blocks; under it, each layer's error before and after."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console(stderr=True), disable=quiet,
        )  # fmt: skip
        self._quiet = quiet
        self._task = self._progress.add_task("blocks", total=None)

    def __enter__(self) -> BlockProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, block: Any) -> None:
        """Take one :class:`kernelgraft_core.quant.runner.BlockResult`."""
        if self._quiet:
            return
        self._progress.update(self._task, total=block.count, completed=block.index + 1)
        for report in block.outcome.reports:
            self._progress.console.print(
                f"[dim]{escape(report.name)}[/] output error {report.error_before:.2e} rounded, "
                f"[bold]{report.error_after:.2e}[/] now"
            )


def layer_table(layers: list[dict[str, Any]]) -> Any:
    """Errors of every layer, from a record."""
    rows = table("layer", "error rounded", "error now", "scales")
    for layer in layers:
        rows.add_row(
            escape(layer["name"]),
            f"{layer['error_before']:.2e}",
            f"{layer['error_after']:.2e}",
            f"{layer['form']} {layer['exponent']:.2f}" if layer["form"] != "identity" else "none",
        )
    return rows
