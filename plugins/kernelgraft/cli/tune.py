"""``kernelgraft tune``: measure what a heuristic otherwise chooses, and remember it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from kernelgraft.errors import KernelgraftError

from .console import console, escape, table
from .shapes import check_positive, parse_features

SHAPES = ("4096x4096", "11008x4096", "4096x11008")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def tune(
    op: Annotated[str | None, typer.Argument(help="Only this op. Default: all that offer a choice.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help=f"Output x input features; may be repeated. Default: {', '.join(SHAPES)}.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens in a call; may be repeated. Default: powers of two up to 512.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Measure which algorithm and tile is fastest for your shapes here, and save it for every later run.

    Plans hold for the exact features, group size and dtype, and for tokens up to the next power of two. They lie in the
    folder plans of $KERNELGRAFT_CACHE_DIR (by default ~/.cache/kernelgraft), one file per processor; deleting it brings
    the built-in choice back. Leave the machine alone meanwhile.

    Examples: [bold]kernelgraft tune w4a16_linear --shape 4096x4096[/], [bold]kernelgraft tune --dtype float16[/]
    """
    shapes = [parse_features(text) for text in shape or SHAPES]
    sizes = check_positive(tokens or list(TOKENS), "--tokens")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"{dtype!r} is not bfloat16, float16 or float32", param_hint="--dtype")
    import torch

    from kernelgraft.families import devices
    from kernelgraft_core.runtime.device import arch_key
    from kernelgraft_core.runtime.plans import PLANS

    device = devices()[-1]
    arch = arch_key(device)
    left_out: set[str] = set()
    before = _read(PLANS.path(arch))
    try:
        with PLANS.tuning(), console(stderr=True).status("measuring") as status:
            for n, k in shapes:
                arguments = {"n": n, "k": k, "group": group_size, "dtype": getattr(torch, dtype)}
                for name, args in _tuned_ops(op, device, {"m": max(sizes)} | arguments, left_out).items():
                    for m in sizes:
                        status.update(f"measuring {name}, {m} tokens, {n}x{k}")
                        _call(name, args[0][:m], *args[1:])
    except RuntimeError as error:  # plans are switched off, or no candidate runs
        raise KernelgraftError(str(error)) from error
    for line in sorted(left_out):
        console(stderr=True).print(escape(line))
    after = _read(PLANS.path(arch))
    changed = {key: entry for key, entry in after.items() if entry != before.get(key)}
    if not changed:
        console().print("nothing to choose: on this machine every shape has one way to run")
        return
    rows = table("op", "tokens", "weight", "chosen", "µs", "next best")
    for cells in sorted((_row(key, entry) for key, entry in changed.items()), key=lambda row: row[:2]):
        (name, n, k), m, *rest = cells
        rows.add_row(name, f"to {m}", f"{n}x{k}", *map(escape, rest))
    console().print(rows)
    console().print(f"saved to {escape(PLANS.path(arch))}")


def _tuned_ops(
    wanted: str | None, device: str, sizes: dict[str, Any], left_out: set[str]
) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op that offers a choice, or of the one that the user names.

    Adds to ``left_out`` who cannot take these sizes.

    Raises:
        ValueError: the named op offers none, the message lists those that do; or none takes these sizes.
    """
    from kernelgraft.families import FAMILIES, examples_of

    known = {name: examples_of(family) for family in FAMILIES for name in examples_of(family).TUNED}
    if wanted is not None and wanted not in known:
        raise ValueError(f"{wanted!r} cannot be tuned; there are {', '.join(sorted(known))}")
    found, refusals = {}, {}
    for name, examples in known.items():
        if wanted in (None, name):
            try:
                found[name] = examples.example_args(device, **sizes)[name]
            except ValueError as error:  # one width may hold a weight that the other cannot
                refusals[name] = error
    if refusals and not found:
        raise next(iter(refusals.values()))
    left_out.update(f"{name} left out: {reason}" for name, reason in refusals.items())
    return found


def _call(name: str, *args: Any) -> None:
    from kernelgraft_core.runtime.op import registered_ops

    registered_ops()[name](*args)


def _read(path: Any) -> dict[str, Any]:
    """The plans in the user's file; it was read, or written, by the plan store just now, so it is sound."""
    found: dict[str, Any] = json.loads(path.read_text())["plans"] if path.exists() else {}
    return found


def _row(key: str, entry: dict[str, Any]) -> tuple[tuple[str, int, int], int, str, str, str]:
    """What a plan is for (op, features, tokens), the fastest candidate, its time and the second."""
    op, _, shape = key.partition("|")
    sizes = dict(part.split("=", 1) for part in shape.split(","))
    (name, time), *others = sorted(entry["us"].items(), key=lambda item: item[1])
    second = f"{others[0][0]} {others[0][1]:.1f}" if others else ""
    return (op.partition("@")[0], int(sizes["n"]), int(sizes["k"])), int(sizes["m"]), name, f"{time:.1f}", second
