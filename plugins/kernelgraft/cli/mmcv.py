"""``kernelgraft mmcv``: a file beside mmcv-lite, for programs in which nothing can be imported first."""

from __future__ import annotations

import typer

from .console import console, escape, table

mmcv = typer.Typer(
    no_args_is_help=True,
    help="mmcv's ops for programs that cannot import kernelgraft.mmcv first: a file beside mmcv-lite.",
)


@mmcv.command("enable")
def enable() -> None:
    """Put a file beside mmcv-lite that leads ``import mmcv._ext`` to kernelgraft, in every program of this environment.

    A compiled mmcv and files of others are left alone. Without kernelgraft the file fails as mmcv-lite does.
    """
    from kernelgraft_openmmlab import beside

    was = beside.status().state
    now = beside.enable()
    console().print(f"{escape(now.path)} {'was there already' if was == 'enabled' else 'written'}")


@mmcv.command("disable")
def disable() -> None:
    """Take that file away."""
    from kernelgraft_openmmlab import beside

    path = beside.status().path
    console().print(f"{escape(path)} {'removed' if beside.disable() else 'is not there: nothing to do'}")


@mmcv.command("status")
def status() -> None:
    """Which module provides mmcv's ops, and which ops kernelgraft has."""
    from kernelgraft_openmmlab import beside

    now = beside.status()
    words = {
        "enabled": "kernelgraft, by the file beside mmcv",
        "disabled": "none, unless kernelgraft.mmcv is imported first",
        "compiled": f"compiled: {now.found}",
        "foreign": f"a file that is not kernelgraft's: {now.found}",
    }
    console().print(f"mmcv at {escape(now.folder)}: its ops are {escape(words[now.state])}")
    from kernelgraft_openmmlab.ext import NAMES, provided

    ours = provided()
    listed = table("op", "kernelgraft")
    for name in NAMES:
        listed.add_row(name, "yes" if name in ours else "[dim]no: raises and says so[/]")
    console().print(listed)
    console().print(f"{sum(name in ours for name in NAMES)} of {len(NAMES)}")
