"""Run a program with plugins loaded first: ``python -m kernelgraft.run tools/test.py CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from . import load_plugin
from .errors import KernelgraftError


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the plugins, then run the script or the module as Python would.

    Exits with 2 when there is no such script, 1 when a plugin cannot be loaded; otherwise as the program does.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kernelgraft.run",
        description="Run a Python program with kernelgraft's plugins loaded first.",
        epilog="Example: python -m kernelgraft.run tools/test.py CONFIG CHECKPOINT",
    )
    parser.add_argument(
        "-p",
        "--plugin",
        action="append",
        metavar="NAME[:OPTION=VALUE,...]",
        help="plugin to load, e.g. sparse-conv:facade=torchsparse; may be repeated (default: mmcv)",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module, as for python -m")
    parser.add_argument("program", help="path of a script, or name of a module with -m")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the program's own arguments")
    chosen = parser.parse_args(arguments)
    if not chosen.module and not Path(chosen.program).is_file():
        parser.error(f"there is no script {chosen.program}")
    try:
        for text in chosen.plugin or ["mmcv"]:
            name, options = _parsed(text)
            load_plugin(name, **options)
    except (KernelgraftError, ValueError) as error:
        print(f"kernelgraft: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    sys.argv = [chosen.program, *chosen.args]
    if chosen.module:
        sys.path.insert(0, "")
        runpy.run_module(chosen.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(chosen.program).resolve().parent))
        runpy.run_path(chosen.program, run_name="__main__")


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    """``"name:option=value,option=value"``.

    Raises:
        ValueError: an option has no value.
    """
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    if wrong := [option for option, sign, _ in pairs if not sign]:
        raise ValueError(f"option {wrong[0]!r} of plugin {name!r} has no value: write {wrong[0]}=VALUE")
    return name, {option.strip(): value for option, _, value in pairs}


if __name__ == "__main__":
    main()
