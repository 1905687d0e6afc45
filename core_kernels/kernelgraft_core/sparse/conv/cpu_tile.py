"""The inner loops of sparse convolution on a CPU, in LLVM instructions: rows are read where they are, and added where
they belong, without a buffer in between.

A block is ``rows`` pairs of one tap times ``vectors`` vectors of output channels, held in registers while the input
channels go by. Which blocks are made depends on the instruction set: they have to fit its registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernelgraft_core.runtime.cpu_vectors import BFLOAT, BY_NAME, F32, I32, I64, Emit, InstructionSet, vector

_UNROLLED = 4  # input channels; a row's address then is fetched once for all of them


@dataclass(frozen=True)
class FloatSet:
    """Blocks for one instruction set.

    Attributes:
        lanes: float32 in a vector.
        widths: vectors of output channels that a block spans, the largest first.
        rows: for each width, how many pairs a block takes, the most first; the last is 1.
        outer: rows and vectors of the block that the gradient of a weight is made of.
        pairs: inputs and weights are bfloat16, two neighbouring input channels in the place of one float32.
    """

    isa: InstructionSet
    lanes: int
    widths: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    outer: tuple[int, int]
    pairs: bool = False


FLOAT_SETS = (  # the best first
    FloatSet(BY_NAME["avx512"], 16, (4, 2, 1), ((6, 2, 1), (12, 4, 1), (12, 4, 1)), (8, 2)),
    FloatSet(BY_NAME["avx2"], 8, (2, 1), ((6, 2, 1), (8, 4, 1)), (4, 2)),
    FloatSet(BY_NAME["generic"], 4, (2, 1), ((6, 2, 1), (8, 4, 1)), (4, 2)),
    FloatSet(BFLOAT, 16, (4, 2, 1), ((6, 2, 1), (12, 4, 1), (12, 4, 1)), (8, 2), pairs=True),
)
BFLOAT_SET = FLOAT_SETS[-1]


@dataclass(frozen=True)
class _Arrays:
    """Where things are, ``i8*``, and how many bytes it is from one row to the next."""

    x: Any
    x_step: Any
    weight: Any
    weight_step: Any
    out: Any
    out_step: Any


def _row(emit: Emit, base: Any, step: Any, rows: Any, index: Any) -> Any:
    """The address of the row that entry ``index`` of ``rows``, int32, names."""
    row = emit.b.zext(emit.load(rows, I32, emit.times(index, 4)), I64)
    return emit.at(base, emit.b.mul(row, step))


def _block(emit: Emit, known: FloatSet, arrays: _Arrays, pairs: tuple[Any, Any], first: Any, size: int, width: int,
           channels: Any) -> None:  # fmt: skip
    """Add the products of ``size`` pairs from ``first`` on."""
    b, kind = emit.b, vector(F32, known.lanes)
    unit = I32 if known.pairs else F32
    multiply = emit.multiply_add_halves if known.pairs else emit.fma
    sources = [_row(emit, arrays.x, arrays.x_step, pairs[0], emit.plus(first, r)) for r in range(size)]
    targets = [_row(emit, arrays.out, arrays.out_step, pairs[1], emit.plus(first, r)) for r in range(size)]
    offsets = [4 * known.lanes * v for v in range(width)]

    def step(channel: Any, unrolled: int, totals: list[Any]) -> list[Any]:
        totals = list(totals)
        at = emit.at(arrays.weight, b.mul(channel, arrays.weight_step))
        for u in range(unrolled):
            weights = [emit.load(at, vector(unit, known.lanes), offset) for offset in offsets]
            for r, source in enumerate(sources):
                value = emit.widen(emit.load(source, unit, emit.plus(emit.times(channel, 4), 4 * u)), known.lanes)
                for v, weight in enumerate(weights):
                    totals[r * width + v] = multiply(value, weight, totals[r * width + v])
            at = emit.at(at, arrays.weight_step)
        return totals

    before = [emit.load(target, kind, offset) for target in targets for offset in offsets]
    whole = b.udiv(channels, ir.Constant(I64, _UNROLLED))
    totals = emit.loop(whole, before, lambda i, sums: step(emit.times(i, _UNROLLED), _UNROLLED, sums))
    done = emit.times(whole, _UNROLLED)
    totals = emit.loop(b.sub(channels, done), totals, lambda i, sums: step(b.add(done, i), 1, sums))
    for r, target in enumerate(targets):
        for v, offset in enumerate(offsets):
            emit.store(totals[r * width + v], target, offset)


@intrinsic(prefer_literal=True)
def add_products(typing_context: Any, known: Any, width: Any, inputs: Any, outputs: Any, count: Any, x: Any,
                 x_step: Any, weight: Any, weight_step: Any, out: Any, out_step: Any,
                 channels: Any) -> Any:  # fmt: skip
    """``out[outputs[i]] += x[inputs[i]] @ weight`` for ``count`` pairs and a few vectors of output channels.

    All but the literals are int64, most of them addresses; numbers are float32, or pairs of bfloat16 beside float32
    sums.

    Args:
        known: index into ``FLOAT_SETS``; width: index into its widths. These two are literal.
        inputs, outputs: int32 rows.
        x, weight, out: the first channel; x_step, weight_step, out_step: bytes from one row to the next.
        channels: of the input.
    """
    chosen = FLOAT_SETS[known.literal_value]
    which = width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        inputs, outputs, count, x, x_step, weight, weight_step, out, out_step, channels = args[2:]
        emit = Emit(builder, chosen.isa)
        arrays = _Arrays(emit.at(x, 0), x_step, emit.at(weight, 0), weight_step, emit.at(out, 0), out_step)
        pairs = emit.at(inputs, 0), emit.at(outputs, 0)
        done: Any = ir.Constant(I64, 0)
        for size in chosen.rows[which]:
            blocks = builder.udiv(builder.sub(count, done), ir.Constant(I64, size))

            def body(i: Any, _: list[Any], size: int = size, done: Any = done) -> list[Any]:
                first = builder.add(done, emit.times(i, size))
                _block(emit, chosen, arrays, pairs, first, size, chosen.widths[which], channels)
                return []

            emit.loop(blocks, [], body)
            done = builder.add(done, emit.times(blocks, size))
        return context.get_dummy_value()

    return types.void(known, width, *([types.int64] * 10)), generate


@intrinsic(prefer_literal=True)
def add_outer(typing_context: Any, known: Any, rows: Any, width: Any, inputs: Any, outputs: Any, count: Any, x: Any,
              x_step: Any, grad: Any, grad_step: Any, out: Any, out_step: Any) -> Any:  # fmt: skip
    """``out += sum_i outer(x[inputs[i]], grad[outputs[i]])`` for ``rows`` channels of x and ``width`` vectors of grad.

    ``known``, ``rows`` and ``width`` are literal; the others as for :func:`add_products`.
    """
    chosen, high, wide = FLOAT_SETS[known.literal_value], rows.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        inputs, outputs, count, x, x_step, grad, grad_step, out, out_step = args[3:]
        emit, kind = Emit(builder, chosen.isa), vector(F32, chosen.lanes)
        inputs, outputs, x, grad, out = (emit.at(each, 0) for each in (inputs, outputs, x, grad, out))
        offsets = [4 * chosen.lanes * v for v in range(wide)]
        places = [
            (emit.at(out, builder.mul(out_step, ir.Constant(I64, r))), offset)
            for r in range(high)
            for offset in offsets
        ]

        def body(i: Any, totals: list[Any]) -> list[Any]:
            source, other = _row(emit, x, x_step, inputs, i), _row(emit, grad, grad_step, outputs, i)
            vectors = [emit.load(other, kind, offset) for offset in offsets]
            results = []
            for r in range(high):
                value = emit.widen(emit.load(source, F32, 4 * r), chosen.lanes)
                results += [emit.fma(value, each, totals[r * wide + v]) for v, each in enumerate(vectors)]
            return results

        before = [emit.load(place, kind, offset) for place, offset in places]
        for total, (place, offset) in zip(emit.loop(count, before, body), places, strict=True):
            emit.store(total, place, offset)
        return context.get_dummy_value()

    return types.void(known, rows, width, *([types.int64] * 9)), generate
