"""Weights dequantized to 16-bit floats by table: a group has at most 16 different values, and vectors look them up.

For processors with AVX-512, which alone have bfloat16 products in vectors; elsewhere blocks are dequantized to float32.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernelgraft_core.runtime.cpu_vectors import (
    F16,
    F32,
    I16,
    I32,
    I64,
    INSTRUCTION_SETS,
    Emit,
    InstructionSet,
    constant,
    vector,
)
from kernelgraft_core.runtime.native import cpu_kernel, pointer

from . import cpu_kernels
from .cpu_kernels import GROUPS, HALF, OUT, QHIGH, QWEIGHT, ROWS, SCALES, ZEROS, K
from .cpu_numbers import float_of_half
from .cpu_tile import unpack_planes

ENTRIES = 16  # of a table; 3-bit weights use 8 of them


def unsupported(isa: InstructionSet, group: int) -> str | None:
    """Why the kernel cannot run for a group size, or None."""
    if "avx512bw" not in isa.needs:
        return f"{isa.name} looks nothing up in vectors of 16-bit numbers"
    return None if group % 64 == 0 else f"group size {group} does not fill a vector"


@intrinsic(prefer_literal=True)
def dequantize_group(typing_context: Any, lanes: Any, bits: Any, kind: Any, words: Any, high: Any, scale: Any,
                     zero: Any, out: Any, count: Any) -> Any:  # fmt: skip
    """Write one group, ``count`` vectors of ``4 * lanes`` weights, as 16-bit floats.

    Args:
        lanes: 16 or 32, of the vectors of int16 that planes are unpacked to; literal, as ``bits`` and ``kind`` are.
        kind: BFLOAT or HALF.
        words, high: addresses in ``qweight``, and in the ``qhigh`` of 3-bit weights.
        scale, zero: of the group, float32.
    """
    width, isa = lanes.literal_value, INSTRUCTION_SETS[0]
    isa = isa if width == isa.lanes else isa.narrow

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, high, scale, zero, out, count = args[3:]
        emit = Emit(builder, isa)
        name = f"llvm.x86.avx512.permvar.hi.{16 * width}"
        table = _table(emit, kind.literal_value, scale, zero)

        def interleave(a: Any, b: Any) -> tuple[Any, Any]:
            """``a0 b0 a1 b1 ...`` in two vectors."""
            each = a.type.count
            order = [lane // 2 + lane % 2 * each for lane in range(2 * each)]
            return emit.shuffle(a, b, order[:each]), emit.shuffle(a, b, order[each:])

        def work(i: Any, _: list[Any]) -> list[Any]:
            planes = unpack_planes(emit, bits.literal_value, [words, high], i)
            found = [emit.call(name, table.type, table, plane) for plane in planes]
            # Two neighbours of a plane are 32 bits; those of planes 0 to 3 follow each other.
            found = [builder.bitcast(each, vector(I32, width // 2)) for each in found]
            left, right = (
                [builder.bitcast(each, vector(I64, width // 4)) for each in interleave(*pair)]
                for pair in (found[:2], found[2:])
            )
            parts = [part for a, b in zip(left, right, strict=True) for part in interleave(a, b)]
            target = emit.at(out, emit.times(i, 8 * width))
            for position, part in enumerate(parts):
                emit.store(part, target, 2 * width * position, align=2)
            return []

        emit.loop(count, [], work)
        return context.get_dummy_value()

    numbers = [types.int64, types.int64, types.float32, types.float32, types.int64, types.int64]
    return types.void(lanes, bits, kind, *numbers), generate


def _table(emit: Emit, kind: int, scale: Any, zero: Any) -> Any:
    """``(q - zero) * scale`` for every integer ``q``, rounded to nearest, in as many lanes as the emitter's vectors."""
    b, floats, words = emit.b, vector(F32, ENTRIES), vector(I32, ENTRIES)
    integers = ir.Constant(floats, [float(q) for q in range(ENTRIES)])
    values = b.fmul(b.fsub(integers, emit.widen(zero, ENTRIES)), emit.widen(scale, ENTRIES))
    if kind == HALF:
        halves = b.bitcast(b.fptrunc(values, vector(F16, ENTRIES)), vector(I16, ENTRIES))
    else:
        bits = b.bitcast(values, words)
        odd = emit.mask(emit.shift_right(bits, 16), 1)
        rounded = emit.shift_right(b.add(b.add(bits, constant(0x7FFF, words)), odd), 16)
        rounded = b.select(b.fcmp_unordered("uno", values, values), constant(0x7FC0, words), rounded)
        halves = b.trunc(rounded, vector(I16, ENTRIES))
    return emit.shuffle(halves, halves, [lane % ENTRIES for lane in range(emit.isa.lanes)])


@functools.cache
def halves_kernel(bits: int, lanes: int, kind: int) -> Any:
    """The kernel that writes rows of a weight as BFLOAT or HALF; its groups are of multiples of ``4 * lanes``."""
    generated_by = cpu_kernels.GENERATORS

    @cpu_kernel(fastmath={"contract"})
    def dequantize_halves(start: int, stop: int, args: Any) -> None:
        """Rows ``start`` to ``stop`` of the weight to ``OUT (ROWS, K)`` of that kind."""
        _ = generated_by
        k, groups, rows = args[K], args[GROUPS], args[ROWS]
        scales = numba.carray(pointer(args[SCALES]), (rows * groups,), np.uint16)
        zeros = numba.carray(pointer(args[ZEROS]), (rows * groups,), np.uint8)
        vectors = k // groups // (4 * lanes)
        word_bytes = lanes if bits == 3 else 2 * lanes  # of a vector's planes in qweight
        for group in range(start * groups, stop * groups):
            first = group * vectors
            dequantize_group(
                lanes, bits, kind, args[QWEIGHT] + first * word_bytes, args[QHIGH] + first * (lanes // 2),
                float_of_half(scales[group]), np.float32(zeros[group]), args[OUT] + first * 8 * lanes, vectors,
            )  # fmt: skip

    return dequantize_halves
