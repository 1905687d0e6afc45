"""The command ``kernelgraft``. Each module here holds a few commands, which import what they need when they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from kernelgraft.errors import KernelgraftError

from . import listing, models
from .bench import bench
from .convert import convert
from .demo import demo
from .mmcv import mmcv
from .tune import tune

app = typer.Typer(
    name="kernelgraft",
    epilog="Example: kernelgraft doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("list")(listing.list_plugins)
app.command("doctor")(listing.doctor)
app.command("quantize")(models.quantize)
app.command("convert")(convert)
app.command("inspect")(models.inspect)
app.command("ppl")(models.ppl)
app.command("demo")(demo)
app.command("bench")(bench)
app.command("tune")(tune)
app.add_typer(mmcv, name="mmcv")


@app.callback()
def _options(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    """Efficient-AI kernels and algorithms, grafted onto vLLM, Transformers, OpenMMLab and PyTorch Geometric."""
    # Nothing to do: main has taken --debug off the command line, so that it may stand anywhere.


_EXTRAS = {
    "torch": "torch, in the build for your machine",
    "transformers": "'kernelgraft[transformers]'",
    "accelerate": "'kernelgraft[transformers]'",
    "numba": "'kernelgraft[cpu]'",
    "jinja2": "'kernelgraft[report]'",
    "matplotlib": "'kernelgraft[report]'",
    "gguf": "'kernelgraft[demo]'",
    "mmcv": "'kernelgraft[openmmlab]'",
    "mmengine": "'kernelgraft[openmmlab]'",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default the process's own, and exit.

    Exit codes: 0 done, 1 failed (one sentence on stderr; ``--debug`` raises instead), 2 wrong usage.
    """
    # Read when torch is imported. Huge pages for large buffers: memory-bound CPU kernels gain 2x and more. GNU OpenMP
    # threads spin for milliseconds before they sleep: on a machine that others use too, each waits for one that the
    # system has put aside, and everything takes 20 times as long. This many turns are some tens of microseconds.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        app([argument for argument in given if argument != "--debug"])
    except (KernelgraftError, ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        sentence = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
            sentence += f": pip install {_EXTRAS[error.name]}"
        print(f"kernelgraft: {sentence}", file=sys.stderr)
        raise SystemExit(1) from None
