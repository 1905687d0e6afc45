"""Rows of numbers moved, rounded and turned, for CPU kernels that numba compiles. All take addresses."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime import cpu_vectors
from kernelgraft_core.runtime.native import pointer

from . import cpu_math, cpu_tile

# numba keeps a compiled kernel until the file that it is written in changes; these generate parts of it.
GENERATORS = hashlib.sha256(
    b"".join(
        Path(str(name)).read_bytes() for name in (cpu_math.__file__, cpu_tile.__file__, cpu_vectors.__file__, __file__)
    )
).hexdigest()


@numba.njit(inline="always")
def copy_words(source: int, target: int, count: int) -> None:
    """``count`` numbers of four bytes."""
    words, copies = numba.carray(pointer(source), (count,), np.int32), numba.carray(pointer(target), (count,), np.int32)
    for c in range(count):
        copies[c] = words[c]


@numba.njit(inline="always")
def copy_halves(source: int, target: int, count: int) -> None:
    """``count`` numbers of two bytes, filled up with a 0 where they are odd."""
    halves, copies = (
        numba.carray(pointer(source), (count,), np.int16),
        numba.carray(pointer(target), (count,), np.int16),
    )
    for c in range(count):
        copies[c] = halves[c]
    pad_halves(target, count)


@numba.njit(inline="always")
def pad_halves(row: int, count: int) -> None:
    """A 0 behind an odd number of halves: they are multiplied in pairs."""
    if count % 2:
        numba.carray(pointer(row), (count + 1,), np.int16)[count] = 0


@numba.njit(inline="always")
def add_floats(a: int, b: int, target: int, count: int) -> None:
    """``target = a + b``, float32."""
    left, right = numba.carray(pointer(a), (count,), np.float32), numba.carray(pointer(b), (count,), np.float32)
    total = numba.carray(pointer(target), (count,), np.float32)
    for c in range(count):
        total[c] = left[c] + right[c]


@numba.njit(inline="always")
def widen_halves(source: int, target: int, count: int) -> None:
    """bfloat16 to float32."""
    halves, bits = numba.carray(pointer(source), (count,), np.uint16), numba.carray(pointer(target), (count,), np.int32)
    for c in range(count):
        bits[c] = np.int32(halves[c]) << np.int32(16)


@numba.njit(inline="always")
def round_floats(source: int, target: int, count: int) -> None:
    """float32 to bfloat16, to the nearest, ties to even."""
    bits, halves = numba.carray(pointer(source), (count,), np.int32), numba.carray(pointer(target), (count,), np.uint16)
    for c in range(count):
        word = bits[c]
        rounded = (word + np.int32(0x7FFF) + ((word >> np.int32(16)) & np.int32(1))) >> np.int32(16)
        is_nan = (word & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000)
        halves[c] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@numba.njit(inline="always")
def vectors_of_block(queries: int, lanes: int, width: int) -> int:
    """How many vectors of queries a block takes when so many queries are left: at most ``width``, and as many in every
    block that follows, since a last one with few would waste more.
    """
    vectors = (queries + lanes - 1) // lanes
    blocks = (vectors + width - 1) // width
    return (vectors + blocks - 1) // blocks


@numba.njit(inline="always")
def turn_rows(source: int, row: int, count: int, scale: float, target: Any) -> None:
    """``target[c, j] = scale * source[j, c]``, for heads that are no whole vectors; ``row``: bytes to the next."""
    for j in range(count):
        values = numba.carray(pointer(source + j * row), (target.shape[0],), np.float32)
        for c in range(target.shape[0]):
            target[c, j] = values[c] * scale
