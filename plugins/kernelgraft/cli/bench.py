"""``kernelgraft bench``: the installed backends against what people run without us, on this machine."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .console import console, escape, table
from .shapes import check_positive, parse_features

SCHEMA = 1
AGREEMENT = 3e-2
"""Relative RMS within which backend and peer have to agree before they are timed; both round to 16 bits."""


@dataclass(frozen=True)
class Subject:
    """One op at one shape: the peer's name, and by name what to time and what to time it in."""

    op: str
    device: str
    shape: dict[str, int]
    peer: str
    runs: dict[str, Callable[[], Any]]
    contexts: dict[str, Callable[[], AbstractContextManager[None]]]


def bench(
    op: Annotated[list[str] | None, typer.Option(help="Only this op, e.g. w4a16_linear; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Output x input features; may be repeated.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in a call; may be repeated.")] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 128,
    threads: Annotated[int | None, typer.Option(help="Threads on CPU. Default: as torch chooses.")] = None,
    rounds: Annotated[int, typer.Option(help="Samples of each; all are timed in turns.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print results and environment as JSON.")] = False,
) -> None:
    """Time every backend that can run an op here, beside what people run without it.

    On CPU, operands are rotated beyond the caches, as the layers of a model are. What a backend computes is compared
    with the peer first. A shared or throttled machine shows in the spread of the times.

    Examples: [bold]kernelgraft bench --threads 1[/],
    [bold]kernelgraft bench --op w4a16_linear --shape 4096x11008 --tokens 1 --tokens 512 --json[/]
    """
    shapes = [parse_features(text) for text in shape or ["4096x4096"]]
    sizes = check_positive(tokens or [1, 16, 256], "--tokens")
    check_positive([rounds], "--rounds")
    import torch

    from kernelgraft.families import devices
    from kernelgraft_core.runtime.timing import environment, measure_in_turns

    if threads is not None:
        check_positive([threads], "--threads")
        torch.set_num_threads(threads)
    results = []
    left_out: set[str] = set()
    device = devices()[-1]
    with console(stderr=True).status("measuring") as status:
        for n, k in shapes:
            for m in sizes:
                for subject in _subjects(op, device, {"m": m, "n": n, "k": k, "group": group_size}, left_out):
                    status.update(f"measuring {subject.op}, {m} tokens, {n}x{k}")
                    times = measure_in_turns(subject.runs, device=device, rounds=rounds, contexts=subject.contexts)
                    results += [_result(subject, name, times) for name in times]
    for line in sorted(left_out):
        console(stderr=True).print(escape(line))
    if as_json:
        print(json.dumps({"schema": SCHEMA, "environment": environment(), "results": results}, indent=1))
        return
    rows = table("op", "tokens", "weight", "run by", "µs", "speed-up")
    for result in results:
        of = result["shape"]
        speedup = "" if result["variant"] == result["peer"] else f"{result['speedup']:.2f}x"
        weight = f"{of['n']}x{of['k']}"
        rows.add_row(
            result["op"], str(of["m"]), weight, escape(result["variant"]), f"{result['us']['p50']:.1f}", speedup
        )
    console().print(rows)


def _subjects(wanted: list[str] | None, device: str, sizes: dict[str, int], left_out: set[str]) -> list[Subject]:
    """Every op that has a peer, or those that the user names; adds to ``left_out`` who cannot take these sizes.

    Raises:
        ValueError: an op that is not there, or no op takes these sizes; KernelgraftError: a backend computes something
            else than the peer.
    """
    from kernelgraft.families import FAMILIES, examples_of

    subjects = {}
    refusals = {}
    for family in FAMILIES:
        examples = examples_of(family)
        try:
            arguments = examples.example_args(device, **sizes)
        except ValueError as error:  # one width may hold a weight that the other cannot
            refusals[family] = error
            continue
        for name, args in arguments.items():
            if (peer := examples.peer(name, args)) and (not wanted or name in wanted):
                subjects[name] = _subject(name, device, sizes, args, peer)
    missing = set(wanted or ()) - subjects.keys()
    if refusals and (missing or not subjects):
        raise next(iter(refusals.values()))
    if not wanted:
        left_out.update(f"{family.rpartition('.')[2]} left out: {reason}" for family, reason in refusals.items())
    if unknown := sorted(missing):
        raise ValueError(f"there is no op {', '.join(unknown)} to measure; --op takes the names that bench shows")
    return list(subjects.values())


def _subject(name: str, device: str, sizes: dict[str, int], args: tuple[Any, ...], peer: Any) -> Subject:
    from kernelgraft.errors import KernelgraftError
    from kernelgraft.families import forced, relative_error
    from kernelgraft_core.runtime.op import registered_ops
    from kernelgraft_core.runtime.timing import rotated

    # On a GPU the timer itself flushes the cache.
    turned = rotated if device == "cpu" else functools.partial
    op = registered_ops()[name]
    peer_name, function, operands = peer
    expected = function(*operands)
    runs: dict[str, Callable[[], Any]] = {peer_name: turned(function, *operands)}
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {}
    for backend, verdict in op.explain(device, *args).items():
        if verdict not in ("runs", "ready"):
            continue
        context = functools.partial(forced, backend)
        with context():
            error = relative_error(op(*args), expected.double())
        if not error < AGREEMENT:
            raise KernelgraftError(f"{name} on backend {backend} differs from {peer_name} by {error:.1e} at {sizes}")
        runs[backend] = turned(op, *args)
        contexts[backend] = context
    return Subject(name, device, sizes, peer_name, runs, contexts)


def _result(subject: Subject, name: str, times: Any) -> dict[str, Any]:
    return {
        "op": subject.op,
        "device": subject.device,
        "shape": subject.shape,
        "variant": name,
        "us": times[name].as_dict(),
        "peer": subject.peer,
        "speedup": round(times[subject.peer].p50 / times[name].p50, 3),
    }
