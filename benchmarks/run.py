"""Measure cases and write one JSON file: ``python -m benchmarks.run --suite cpu --case w4a16 --threads 1 --out FILE``.

Every variant is compared with the float64 reference first; then all variants of a case at one shape are timed in turns.
Exit status: 0 measured, 1 a case cannot run here or is wrong (nothing is written), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_core.runtime.timing import environment, measure_in_turns

from . import byte_cases as byte_cases  # registers its cases
from . import flatformer_cases as flatformer_cases
from . import openmmlab_cases as openmmlab_cases
from . import sparse_cases as sparse_cases  # likewise
from . import sparse_networks as sparse_networks
from .cases import Case, Shape, UnavailableError, Variant, select

SCHEMA = 1


def run_case(case: Case, shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """One result for each variant.

    Raises:
        UnavailableError: a variant cannot run here.
        AssertionError: a variant's result is wrong.
    """
    prepared = case.prepare(shape)
    errors, scratch = {}, {}
    for name, variant in prepared.variants.items():
        with _context(variant):
            out = variant.run()
            assert_close(f"{case.name} {dict(shape)} {name}", prepared.reference, out, variant.ratio)
            errors[name] = _errors(prepared.reference, out)
            scratch[name] = _scratch_bytes(variant.run, case.device, out.nbytes)
    contexts = {name: variant.context for name, variant in prepared.variants.items() if variant.context}
    runs = {name: variant.run for name, variant in prepared.variants.items()}
    # Long samples: after another variant the first run finds neither code nor operands in the caches.
    times = measure_in_turns(runs, device=case.device, rounds=rounds, contexts=contexts, sample_us=10_000)
    peer = prepared.variants[case.peer]
    results = []
    for name, variant in prepared.variants.items():
        seconds = times[name].p50 / 1e6
        results.append(
            {
                "case": case.name,
                "op": case.op,
                "variant": name,
                "backend": variant.backend,
                "shape": dict(shape),
                "dtype": variant.dtype,
                "device": case.device,
                "rotated": case.rotates,
                "us": times[name].as_dict(),
                "peer": case.peer,
                "speedup": round(times[case.peer].p50 / times[name].p50, 3),
                "gflops": round(case.flops(shape) / seconds / 1e9, 3),
                "gbps": round(case.bytes(shape) / seconds / 1e9, 3),
                "weight_bytes": variant.weight_bytes,
                "weight_ratio": round(variant.weight_bytes / peer.weight_bytes, 4)
                if variant.weight_bytes and peer.weight_bytes
                else None,
                "scratch_bytes": scratch[name],
                **errors[name],
            }
        )
    return results


def write(results: list[dict[str, Any]], env: dict[str, Any], out: Path) -> None:
    """Write a result file."""
    write_json({"schema": SCHEMA, "env": env, "results": results}, out)


def write_json(document: dict[str, Any], out: Path) -> None:
    """Write a file in one step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.replace(temporary, out)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=("cpu", "cuda", "host"), default="cpu")
    parser.add_argument("--case", action="append", default=[], help="only this case; may be repeated")
    parser.add_argument("--shape", action="append", default=[], help='only shapes with these sizes, e.g. "m=1,k=4096"')
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20, help="samples of each variant")
    parser.add_argument("--out", type=Path, help="JSON file; without it only the table is printed")
    options = parser.parse_args(arguments)
    try:
        cases = select(options.suite, tuple(options.case))
        wanted = [_parse_shape(text) for text in options.shape]
        if options.threads < 1 or options.rounds < 1:
            raise ValueError(f"threads is {options.threads} and rounds {options.rounds}, expected 1 or more")
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    env = environment()
    results: list[dict[str, Any]] = []
    for case in cases:
        for shape in case.shapes:
            if wanted and not any(sizes.items() <= shape.items() for sizes in wanted):
                continue
            try:
                measured = run_case(case, shape, options.rounds)
            except (UnavailableError, AssertionError) as error:
                print(f"benchmarks.run: {case.name}: {error}", file=sys.stderr)
                return 1
            for result in measured:
                print(_row(result), flush=True)
            results += measured
    if not results:
        print("benchmarks.run: no shape matches", file=sys.stderr)
        return 2
    env["load_after"] = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    if options.out:
        write(results, env, options.out)
    return 0


def _context(variant: Variant) -> contextlib.AbstractContextManager[object]:
    return variant.context() if variant.context else contextlib.nullcontext()


def _errors(reference: Tensor, out: Tensor) -> dict[str, float]:
    difference = out.detach().double().cpu() - reference.cpu()
    return {
        "max_abs_err": difference.abs().max().item(),
        "rel_err_vs_reference": (difference.square().mean().sqrt() / reference.square().mean().sqrt()).item(),
    }


def _scratch_bytes(run: Callable[[], Tensor], device: str, result: int) -> int:
    """Most memory that torch's allocators held during a run, beyond what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - result)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    held = peak = 0
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return max(0, peak - result)


def _parse_shape(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not name or not value.isdigit():
            raise ValueError(f"shape {text!r} is not of the form m=1,k=4096")
        sizes[name] = int(value)
    return sizes


def _row(result: dict[str, Any]) -> str:
    shape = " ".join(f"{name}={size}" for name, size in result["shape"].items())
    us = result["us"]
    return (
        f"{result['case']:<12} {shape:<24} {result['variant']:<36} {us['p50']:>12.2f} µs "
        f"(min {us['min']:.2f}, p80 {us['p80']:.2f})  {result['speedup']:>7.2f}x {result['peer']}"
    )


if __name__ == "__main__":
    sys.exit(main())
