"""Run a program with plugins loaded first: ``python -m kernelgraft.run tools/test.py CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse
import functools
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(given)
    begin = len(given) - len(chosen.args)
    if given[begin - 1] == "--" and given[begin - 2 : begin - 1] == [chosen.program]:
        chosen.args.insert(0, "--")  # the program's, not argparse's
    if not chosen.module and not Path(chosen.program).is_file():
        parser.error(f"there is no script {chosen.program}")
    try:
        load(chosen.plugin or ["mmcv"])
    except (KernelgraftError, ValueError) as error:
        print(f"kernelgraft: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    _pass_on(chosen.plugin or ["mmcv"])
    sys.argv = [chosen.program, *chosen.args]
    if chosen.module:
        sys.path.insert(0, "")
        runpy.run_module(chosen.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(chosen.program).resolve().parent))
        runpy.run_path(chosen.program, run_name="__main__")


def load(plugins: list[str]) -> list[str]:
    """Load plugins given as on the command line, and return them.

    Raises:
        KernelgraftError, ValueError: one cannot be loaded.
    """
    for text in plugins:
        name, options = _parsed(text)
        load_plugin(name, **options)
    return plugins


class _Loaded:
    """Loads the plugins where it is unpickled."""

    def __init__(self, plugins: list[str]) -> None:
        self._plugins = plugins

    def __reduce__(self) -> tuple[Callable[[list[str]], list[str]], tuple[list[str]]]:
        return load, (self._plugins,)


def _pass_on(plugins: list[str]) -> None:
    """Have processes that are spawned load the plugins, too, before they import the program.

    A spawned process unpickles a dict of preparations first and imports the main module then.
    """
    from multiprocessing import spawn

    prepare = spawn.get_preparation_data

    @functools.wraps(prepare)
    def get_preparation_data(name: str) -> dict[str, Any]:
        return prepare(name) | {"kernelgraft": _Loaded(plugins)}

    spawn.get_preparation_data = get_preparation_data


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
    from kernelgraft.run import main as run  # not this module, whose name a spawned process cannot unpickle

    run()
