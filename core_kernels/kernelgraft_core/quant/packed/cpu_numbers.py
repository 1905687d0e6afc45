"""Conversions of numbers for CPU kernels that numba compiles, in vectors: LLVM would not vectorize their loops."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernelgraft_core.runtime.cpu_vectors import F16, F32, I16, I32, I64, INSTRUCTION_SETS, Emit, constant, vector

RUN = 16  # floats that are rounded together; LLVM splits them where vectors are shorter
_FLOATS, _INTEGERS = vector(F32, RUN), vector(I32, RUN)
_ANY = INSTRUCTION_SETS[-1]


@intrinsic
def largest_magnitude(typing_context: Any, source: Any, count: Any) -> Any:
    """Bits, int32, of the largest magnitude of ``count`` float32, a multiple of RUN, at address ``source``.

    Magnitudes compare like the integers of their bits, and whatever is not finite is larger than all others.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(builder, _ANY)

        def look(i: Any, largest: list[Any]) -> list[Any]:
            bits = emit.mask(emit.load(args[0], _INTEGERS, emit.times(i, 4 * RUN)), 0x7FFFFFFF)
            return [builder.select(builder.icmp_signed(">", bits, largest[0]), bits, largest[0])]

        runs = builder.udiv(args[1], ir.Constant(I64, RUN))
        (largest,) = emit.loop(runs, [constant(0, _INTEGERS)], look)
        return emit.call(f"llvm.vector.reduce.smax.v{RUN}i32", I32, largest)

    return types.int32(types.int64, types.int64), generate


@intrinsic
def round_run(typing_context: Any, source: Any, target: Any, count: Any, scale: Any, inverse: Any) -> Any:
    """``count`` float32 at ``source``, a multiple of RUN, times ``inverse`` to the nearest int16 at ``target``.

    What is left at ``source`` is what ``scale`` times the integers lacks. Returns the sum of the integers and the sum
    of their magnitudes, int32.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(builder, _ANY)
        scales, inverses = emit.widen(args[3], RUN), emit.widen(args[4], RUN)

        def work(i: Any, sums: list[Any]) -> list[Any]:
            here = emit.at(args[0], emit.times(i, 4 * RUN))
            values = emit.load(here, _FLOATS)
            nearest = emit.call(f"llvm.rint.v{RUN}f32", _FLOATS, builder.fmul(values, inverses))
            emit.store(emit.fma(builder.fneg(nearest), scales, values), here)
            integers = builder.fptosi(nearest, _INTEGERS)
            emit.store(builder.trunc(integers, vector(I16, RUN)), args[1], emit.times(i, 2 * RUN))
            sizes = builder.select(
                builder.icmp_signed("<", integers, constant(0, _INTEGERS)), builder.neg(integers), integers
            )
            return [builder.add(sums[0], integers), builder.add(sums[1], sizes)]

        runs = builder.udiv(args[2], ir.Constant(I64, RUN))
        sums = emit.loop(runs, [constant(0, _INTEGERS)] * 2, work)
        totals = [emit.call(f"llvm.vector.reduce.add.v{RUN}i32", I32, each) for each in sums]
        return context.make_tuple(builder, signature.return_type, totals)

    pair = types.UniTuple(types.int32, 2)
    return pair(types.int64, types.int64, types.int64, types.float32, types.float32), generate


@intrinsic
def round_bytes(typing_context: Any, source: Any, target: Any, count: Any, scale: Any) -> Any:
    """``count`` float32 at ``source``, a multiple of RUN, over ``scale`` to the nearest int8 at ``target``; its sum."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(builder, _ANY)
        scales = emit.widen(args[3], RUN)

        def work(i: Any, sums: list[Any]) -> list[Any]:
            values = emit.load(args[0], _FLOATS, emit.times(i, 4 * RUN))
            # A product with the inverse would round some halves the other way.
            nearest = emit.call(f"llvm.rint.v{RUN}f32", _FLOATS, builder.fdiv(values, scales))
            integers = builder.fptosi(nearest, _INTEGERS)
            emit.store(builder.trunc(integers, vector(ir.IntType(8), RUN)), args[1], emit.times(i, RUN), align=1)
            return [builder.add(sums[0], integers)]

        runs = builder.udiv(args[2], ir.Constant(I64, RUN))
        (total,) = emit.loop(runs, [constant(0, _INTEGERS)], work)
        return emit.call(f"llvm.vector.reduce.add.v{RUN}i32", I32, total)

    return types.int32(types.int64, types.int64, types.int64, types.float32), generate


@intrinsic(prefer_literal=True)
def spread_planes(typing_context: Any, lanes: Any, source: Any, target: Any) -> Any:
    """``4 * lanes`` int16 in their own order, at ``source``, to the four planes of a vector at ``target``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, count = Emit(builder, _ANY), lanes.literal_value
        pairs = emit.load(args[1], vector(I32, 2 * count))
        for plane in range(4):
            order = [4 * t + plane for t in range(count // 2)]
            emit.store(emit.shuffle(pairs, pairs, order), args[2], 2 * count * plane)
        return context.get_dummy_value()

    return types.void(lanes, types.int64, types.int64), generate


@intrinsic
def unpack_scales(typing_context: Any, scales: Any, zeros: Any, scale: Any, shift: Any, count: Any) -> Any:
    """``count`` float16 scales to float32 at ``scale``, and times their uint8 zero points at ``shift``; all addresses.

    ``count`` is at least RUN. What does not fill a last run is done with it a second time.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, run = Emit(builder, _ANY), ir.Constant(I64, RUN)
        scales, zeros, scale, shift, count = args
        last = builder.sub(count, run)

        def work(i: Any, _: list[Any]) -> list[Any]:
            at = builder.mul(i, run)
            at = builder.select(builder.icmp_signed("<", at, last), at, last)
            values = builder.fpext(emit.load(scales, vector(F16, RUN), emit.times(at, 2), align=2), _FLOATS)
            points = builder.uitofp(emit.load(zeros, vector(ir.IntType(8), RUN), at, align=1), _FLOATS)
            emit.store(values, scale, emit.times(at, 4))
            emit.store(builder.fmul(values, points), shift, emit.times(at, 4))
            return []

        emit.loop(builder.udiv(emit.plus(count, RUN - 1), run), [], work)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 5)), generate


@intrinsic
def float_of_half(typing_context: Any, bits: Any) -> Any:
    """The float32 of a float16 given by its bits, uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], F16), F32)

    return types.float32(types.uint16), generate


@intrinsic
def half_of_float(typing_context: Any, value: Any) -> Any:
    """The bits, uint16, of the float16 next to a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], F16), I16)

    return types.uint16(types.float32), generate
