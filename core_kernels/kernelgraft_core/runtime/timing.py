"""Measuring variants against each other fairly: in turns, in one process, with the environment on record."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

import kernelgraft_core

from . import device as devices

Run = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Times:
    """Microseconds of one run: 20th, 50th and 80th percentile and the least of ``n`` samples."""

    p20: float
    p50: float
    p80: float
    min: float
    n: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        """From samples in microseconds, at least one."""
        cuts = statistics.quantiles(samples * 2 if len(samples) == 1 else samples, n=10, method="inclusive")
        p20, p50, p80, least = (round(t, 3) for t in (cuts[1], cuts[4], cuts[7], min(samples)))
        return cls(p20, p50, p80, least, len(samples))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_in_turns(
    variants: Mapping[str, Run],
    *,
    device: str = "cpu",
    rounds: int = 20,
    sample_us: float = 1000.0,
    contexts: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, Times]:
    """Time variants round by round, each once a round: a machine that slows down slows all of them.

    On CPU a sample is the mean of as many runs as take ``sample_us``; a variant that should find its operands outside
    the caches has to rotate over copies itself. On a GPU a sample is one replay of a CUDA graph of the run, between two
    events, with the L2 cache flushed before it.

    Args:
        variants: functions by name; they must not depend on each other.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: samples of each variant, 1 or more.
        contexts: what a variant's runs happen in, by its name; entering it is not timed.

    Raises:
        ValueError: no rounds, or another device.
    """
    if rounds < 1 or device not in ("cpu", "cuda"):
        raise ValueError(f"cannot measure {rounds} rounds on {device!r}")
    prepare = functools.partial(_cpu_sampler, sample_us=sample_us) if device == "cpu" else _gpu_sampler
    inside = {name: (contexts or {}).get(name, contextlib.nullcontext) for name in variants}
    samplers: dict[str, Callable[[], float]] = {}
    for name, run in variants.items():
        with inside[name]():
            samplers[name] = prepare(run)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, sample in samplers.items():
            with inside[name]():
                samples[name].append(sample())
    return {name: Times.of(taken) for name, taken in samples.items()}


def rotated(compute: Callable[..., T], *operands: torch.Tensor | None) -> Callable[[], T]:
    """``compute(*operands)`` over copies that together are twice the last-level cache, one after another.

    A layer of a model finds its weight in memory: the other layers have run in between. An operand may be absent.
    """
    size = max(1, sum(operand.nbytes for operand in operands if operand is not None))
    cache = devices.cpu_info().last_level_cache or 64 << 20
    copies = 1 + -(-2 * cache // size)
    turns = itertools.cycle(
        [operands, *(tuple(t if t is None else t.clone() for t in operands) for _ in range(copies - 1))]
    )
    return lambda: compute(*next(turns))


def measure_us(run: Run, *, device: str = "cpu", rounds: int = 7) -> float:
    """Median microseconds of one run: what ``PLANS.tune`` takes as ``measure``."""
    return measure_in_turns({"run": run}, device=device, rounds=rounds)["run"].p50


def environment() -> dict[str, Any]:
    """What a result must be read with: versions, commit, machine, threads and load.

    Keys: ``kernelgraft git dirty torch triton numba python cpu cores threads governor load gpu sm driver cuda date``;
    None where something is absent, e.g. git in an installed package.
    """
    cpu, gpus = devices.cpu_info(), devices.gpu_info()
    return {
        "kernelgraft": kernelgraft_core.__version__,
        "git": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "torch": torch.__version__,
        "triton": devices.version_of("triton"),
        "numba": devices.version_of("numba"),
        "python": platform.python_version(),
        "cpu": cpu.model,
        "isa": sorted(cpu.isa),
        "cores": cpu.cores,
        "threads": torch.get_num_threads(),
        "governor": _governor(),
        "load": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "gpu": gpus[0].name if gpus else None,
        "sm": "{}{}".format(*gpus[0].capability) if gpus else None,
        "driver": _driver() if gpus else None,
        "cuda": torch.version.cuda,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_sampler(run: Run, sample_us: float) -> Callable[[], float]:
    run()  # compiles, allocates
    repeat, elapsed = 1, 0.0
    while True:
        elapsed = _elapsed_us(run, repeat)
        if elapsed >= sample_us / 2 or repeat >= 1 << 20:
            break
        repeat *= 2
    repeat = max(1, round(repeat * sample_us / max(elapsed, 1e-3)))
    return lambda: _elapsed_us(run, repeat) / repeat


def _elapsed_us(run: Run, repeat: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeat):
        run()
    return (time.perf_counter_ns() - start) / 1e3


def _gpu_sampler(run: Run) -> Callable[[], float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates before the capture, which forbids both
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = _l2_flush()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        flush.zero_()
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3

    sample()
    return sample


@functools.cache
def _l2_flush() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any GPU's L2


def _git(*arguments: str) -> str | None:
    """Output of git on this source tree; None where it is no checkout of it or git is absent."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), *arguments]
    tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", "op.py"]
    try:
        subprocess.run(tracked, capture_output=True, check=True, timeout=10)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else None


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else None
