"""Split a compiled CPU kernel over torch's own threads.

Where torch runs on OpenMP, the kernel runs on the very same team (``GOMP_parallel`` of the library that torch calls):
forking and joining costs about 2 µs instead of about 60 µs for a Python thread pool, and alternating with torch's own
operators neither oversubscribes the cores nor wakes a second set of threads. Elsewhere a thread pool does the work.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import HOME_PROCESS

log = logging.getLogger("kernelgraft")
_lock = threading.Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None

# void(int64 start, int64 stop, int64 *args); ctypes lets go of Python's lock while it runs.
_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
_GompParallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def parallel_for(
    kernel_address: int,
    args: ctypes.Array[ctypes.c_int64],
    items: int,
    *,
    grain: int = 1,
    bounds: Sequence[int] | None = None,
) -> None:
    """Run ``kernel(start, stop, args)`` over ``0 .. items`` on up to ``torch.get_num_threads()`` threads, and wait.

    Each thread gets one contiguous run of items. One thread suffices when there are no more than ``grain`` items; then,
    and in a forked child, the kernel runs at once in the calling thread: OpenMP does not survive a fork.

    Args:
        kernel_address: of a C function ``void(int64 start, int64 stop, int64 *args)``, such as
            :func:`kernelgraft_core.runtime.native.cpu_kernel` makes. It must not raise and not call ``parallel_for``.
        args: passed on as it is. What it points to must stay alive until this returns.
        items: how many, 0 or more.
        grain: runs begin at multiples of it; the least worth a thread.
        bounds: ``p + 1`` ascending item numbers from 0 to ``items`` that cut the work into ``p`` parts of equal cost,
            instead of ``grain``. Best with ``p`` a multiple of ``torch.get_num_threads()``.

    Raises:
        ValueError: items is negative, grain is not positive, or bounds does not ascend from 0 to items.
    """
    if items < 0 or grain < 1:
        raise ValueError(f"items is {items} and grain {grain}, expected at least 0 and 1")
    if bounds is not None and (
        len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != items or any(a > b for a, b in pairwise(bounds))
    ):
        raise ValueError(f"bounds {list(bounds)[:8]} do not ascend from 0 to {items}")
    if items == 0:
        return
    threads = available_threads()
    parts = min(threads, -(-items // grain)) if bounds is None else len(bounds) - 1
    if threads == 1 or parts == 1:
        _kernel(kernel_address)(0, items, ctypes.addressof(args))
        return
    if bounds is None:
        bounds = _even_bounds(items, grain, parts)
    run_on_team = _openmp_team()
    if run_on_team is not None:
        run_on_team(kernel_address, args, bounds, threads)
    else:
        _run_on_pool(kernel_address, args, bounds, threads)


@dataclass(frozen=True)
class Phase:
    """One kernel of a launch, over ``0 .. items``; the same as the arguments of :func:`parallel_for`."""

    kernel: int
    items: int
    grain: int = 1


class Launch:
    """Kernels that run one after another over the same numbers, each on all threads, with one fork and join.

    Made once for each combination of sizes, and called as often as there is something to compute, from any thread.

    Args:
        phases: every item of one is done before the next begins.
    """

    def __init__(self, *phases: Phase) -> None:
        from .native import run_phases

        self.phases = phases
        self._address = run_phases.address
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._address)
        self._fits_one = all(phase.items <= phase.grain for phase in phases)
        self._alone, self._team, self._fork_and_join = self._task(0, 0, 0), None, None
        openmp = _openmp()
        if openmp is not None:
            self._team = self._task(openmp.thread_number, openmp.team_size, openmp.barrier)
            self._fork_and_join = openmp.fork_and_join

    def _task(self, *functions: int) -> ctypes.Array[ctypes.c_int64]:
        told = [len(self.phases), *functions]  # native.PHASES and on
        for phase in self.phases:
            told += phase.kernel, phase.items, phase.grain
        return (ctypes.c_int64 * len(told))(*told)

    def __call__(self, *numbers: int) -> None:
        """Run all phases and wait.

        Args:
            numbers: sizes and addresses, each 64 bits. Kernels get them behind one number that is the launch's own, and
                must not change them. What they point to must stay alive until this returns.
        """
        threads = 1 if self._fits_one else available_threads()
        if threads == 1:
            # Bytes, because packing them takes a quarter of the time that filling a ctypes array does.
            self._run(_packed(len(numbers)).pack(ctypes.addressof(self._alone), *numbers))
        elif self._team is not None and self._fork_and_join is not None:
            args = _packed(len(numbers)).pack(ctypes.addressof(self._team), *numbers)
            self._fork_and_join(self._address, args, threads, 0)
        else:
            told = (ctypes.c_int64 * (1 + len(numbers)))(0, *numbers)
            for phase in self.phases:
                parallel_for(phase.kernel, told, phase.items, grain=phase.grain)


@functools.cache
def _packed(count: int) -> struct.Struct:
    return struct.Struct(f"{1 + count}q")


def available_threads() -> int:
    """How many threads :func:`parallel_for` uses now: ``torch.get_num_threads()``, or 1 in a forked child."""
    if os.getpid() != HOME_PROCESS:
        _say_forked()
        return 1
    return torch.get_num_threads()


def mechanism() -> str:
    """What splits the work in this process, for reports: ``"openmp"``, ``"pool"`` or ``"one thread (forked)"``."""
    if os.getpid() != HOME_PROCESS:
        return "one thread (forked)"
    return "pool" if _openmp_team() is None else "openmp"


@functools.cache
def _say_forked() -> None:
    log.warning("process %d was forked: CPU kernels run on one thread in it; spawned processes use all", os.getpid())


@functools.lru_cache(maxsize=1024)
def _even_bounds(items: int, grain: int, parts: int) -> tuple[int, ...]:
    blocks = -(-items // grain)
    return tuple(min(items, blocks * part // parts * grain) for part in range(parts + 1))


@functools.lru_cache(maxsize=1024)
def _kernel(address: int) -> Callable[[int, int, int], None]:
    return _Kernel(address)


def _gomp_symbol(name: str) -> int | None:
    """Address of an OpenMP function as torch itself resolves it: global scope first, then what libtorch depends on.

    Another copy of libgomp may be loaded as well (numba's, scikit-learn's); it has threads of its own.
    """
    if sys.platform != "linux":
        return None  # torch's libomp on macOS and Windows does not export GOMP_parallel
    scopes = [ctypes.CDLL(None)]
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.exists():
        scopes.append(ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_NOLOAD))
    for scope in scopes:
        if hasattr(scope, name):
            return ctypes.cast(getattr(scope, name), ctypes.c_void_p).value
    return None


@dataclass(frozen=True)
class _OpenMP:
    """Torch's own OpenMP: a function that forks and joins, and the addresses of three that a team calls."""

    fork_and_join: Callable[[int, int | bytes, int, int], None]
    thread_number: int
    team_size: int
    barrier: int


@functools.cache
def _openmp() -> _OpenMP | None:
    """None where torch has none, or without numba, which makes what its threads run."""
    if not torch.backends.openmp.is_available():
        return None
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
    found = [address for address in map(_gomp_symbol, names) if address is not None]
    if len(found) < len(names):
        log.info("no GOMP_parallel beside torch: CPU kernels run on a thread pool")
        return None
    if importlib.util.find_spec("numba") is None:
        log.info("numba is not installed: CPU kernels run on a thread pool")
        return None
    return _OpenMP(_GompParallel(found[0]), *found[1:])


@functools.cache
def _openmp_team() -> Callable[[int, Any, Sequence[int], int], None] | None:
    """A function that runs parts of the work on torch's OpenMP threads, or None where there are none."""
    openmp = _openmp()
    if openmp is None:
        return None
    from .native import team_member

    member = team_member.address

    def run(kernel: int, args: Any, bounds: Sequence[int], threads: int) -> None:
        # native.KERNEL and on
        header = (kernel, ctypes.addressof(args), len(bounds) - 1, openmp.thread_number, openmp.team_size)
        task = (ctypes.c_int64 * (len(header) + len(bounds)))(*header, *bounds)
        # Always torch's own number of threads: libgomp ends and restarts threads whenever a team's size changes.
        openmp.fork_and_join(member, ctypes.addressof(task), threads, 0)

    return run


def _run_on_pool(kernel: int, args: Any, bounds: Sequence[int], threads: int) -> None:
    """Parts 0, threads, 2 threads, ... run here, the others on the pool."""
    call, address, parts = _kernel(kernel), ctypes.addressof(args), len(bounds) - 1

    def member(first: int) -> None:
        for part in range(first, parts, threads):
            if bounds[part] < bounds[part + 1]:
                call(bounds[part], bounds[part + 1], address)

    pool = _executor(threads)
    others = [pool.submit(member, first) for first in range(1, min(threads, parts))]
    member(0)
    for other in others:
        other.result()


def _executor(threads: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool[0] < threads:
            # A smaller pool is dropped, not shut down: a call that still submits to it keeps it alive until it is done.
            _pool = threads, ThreadPoolExecutor(threads, thread_name_prefix="kernelgraft")
        return _pool[1]
