"""Writing CPU kernels in numba for :func:`kernelgraft_core.runtime.threads.parallel_for`.

A kernel is a C function ``void(int64 start, int64 stop, int64 *args)`` that does items ``start`` to ``stop``; ``args``
holds sizes and data pointers::

    @cpu_kernel()
    def scale(start, stop, args):
        x = numba.carray(pointer(args[1]), (args[0],), np.float32)
        for i in range(start, stop):
            x[i] *= np.float32(2)

    args = (ctypes.c_int64 * 2)(x.numel(), x.data_ptr())
    parallel_for(scale.address, args, x.numel(), grain=1024)

A kernel runs without Python's lock: it must not raise (numba would only print the error), and must not call
``parallel_for``. It is cached on disk under the source of its own file only, so a kernel that is generated, or that
calls a function of another file, needs something of its own in its source that changes with it.

Raises:
    ImportError: on import, where numba is not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

try:
    import numba
    import numpy as np
    from llvmlite import ir
    from numba import cfunc, types
    from numba.core.registry import cpu_target
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("compiled CPU kernels need numba: pip install 'kernelgraft[cpu]'") from error

SIGNATURE = types.void(types.int64, types.int64, types.CPointer(types.int64))


def cpu_kernel(*, fastmath: bool | set[str] = False) -> Callable[[Callable[..., None]], Any]:
    """Compile a kernel; the result has ``.address`` (for ``parallel_for``) and must be kept alive, as a global is.

    Args:
        fastmath: as for ``numba.njit``; ``{"contract"}`` allows fused multiply-add alone.
    """
    compiled: Callable[[Callable[..., None]], Any] = cfunc(SIGNATURE, cache=True, fastmath=fastmath)
    return compiled


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """``pointer(address: int64)`` inside a kernel: an untyped pointer, for ``numba.carray``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _call_kernel(typing_context: Any, address: Any, start: Any, stop: Any, args: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [word, word, word])
        builder.call(builder.inttoptr(values[0], function.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def _call_plain(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(values[0], function.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _call_int(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(values[0], function.as_pointer()), []), ir.IntType(64))

    return types.int64(types.int64), generate


# What a team of OpenMP threads is told: one int64 array, in this order. OpenMP's two functions come as addresses
# because numba does not cache a function that holds one.
KERNEL, ARGS, PARTS, THREAD_NUMBER, TEAM_SIZE, BOUNDS = range(6)


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def team_member(task: Any) -> None:
    """Run by every thread of an OpenMP team: part ``p`` is ``task[BOUNDS + p]`` to ``task[BOUNDS + p + 1]``.

    OpenMP may give fewer threads than were asked for; each then takes more than one part.
    """
    first = _call_int(task[THREAD_NUMBER])
    step = _call_int(task[TEAM_SIZE])
    for part in range(first, task[PARTS], step):
        start = task[BOUNDS + part]
        stop = task[BOUNDS + part + 1]
        if start < stop:
            _call_kernel(task[KERNEL], start, stop, task[ARGS])


# What a launch of several kernels is told: one int64 array, in this order, then KERNEL, ITEMS and GRAIN of each phase.
# BARRIER, and the two functions before it, are 0 where one thread does everything.
PHASES, PHASE_THREAD_NUMBER, PHASE_TEAM_SIZE, BARRIER, FIRST_PHASE = range(5)


@cfunc(types.void(types.int64), cache=True)
def run_phases(args: Any) -> None:
    """Run by every thread of a team: its share of each phase, waiting for the others in between.

    The address of the array above is the first of ``args``, which every kernel gets whole.
    """
    address = numba.carray(pointer(args), (1,), np.int64)[0]
    task = numba.carray(pointer(address), (FIRST_PHASE,), np.int64)
    number, size = 0, 1
    if task[BARRIER]:
        number, size = _call_int(task[PHASE_THREAD_NUMBER]), _call_int(task[PHASE_TEAM_SIZE])
    for phase in range(task[PHASES]):
        if phase > 0 and task[BARRIER]:
            _call_plain(task[BARRIER])
        told = numba.carray(pointer(address + 8 * (FIRST_PHASE + 3 * phase)), (3,), np.int64)
        kernel, items, grain = told[0], told[1], told[2]
        runs = (items + grain - 1) // grain
        start = min(items, runs * number // size * grain)
        stop = min(items, runs * (number + 1) // size * grain)
        if start < stop:
            _call_kernel(kernel, start, stop, args)


@functools.cache
def target_features() -> frozenset[str]:
    """What LLVM calls the features of the processor that numba compiles for, e.g. ``"avx512vnni"``."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(feature[1:] for feature in features.split(",") if feature.startswith("+"))
