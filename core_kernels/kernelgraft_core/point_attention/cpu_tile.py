"""Products of small matrices and attention of one head, in LLVM instructions, for tiles that stay in a core's cache.

A block is a few rows times a few vectors of columns, held in registers while what is summed over goes by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernelgraft_core.runtime.cpu_vectors import (
    BF16,
    BFLOAT,
    BY_NAME,
    F32,
    I16,
    I32,
    I64,
    Emit,
    InstructionSet,
    constant,
    vector,
)

from .cpu_math import gelu, larger, power_of_two

LOWEST_FLOAT = -3.4028234663852886e38
_UNROLLED = 4  # steps of what is summed over
PLAIN, GELU, GELU_HALVES = 0, 1, 2  # what is done to a product before it is stored: the last is rounded to bfloat16


@dataclass(frozen=True)
class TileSet:
    """Blocks for one instruction set.

    Attributes:
        lanes: float32 in a vector.
        width: vectors of columns in a block of a linear layer; its weight comes in panels of as many columns.
        rows: of a block, for each number of vectors up to ``width``.
        outputs: rows of a block of outputs of attention, for each number of vectors up to ``width``; they divide
            ``lanes``.
        pairs: linear layers multiply bfloat16, two neighbouring channels in the place of one float32.
    """

    isa: InstructionSet
    lanes: int
    width: int
    rows: tuple[int, ...]
    outputs: tuple[int, ...]
    pairs: bool = False

    @property
    def panel(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.width

    @property
    def linear_rows(self) -> int:
        """Rows of a block of a linear layer."""
        return self.rows[self.width - 1]

    @property
    def channel_bytes(self) -> int:
        """Of an input of a linear layer."""
        return 2 if self.pairs else 4


TILE_SETS = (  # the best first
    TileSet(BY_NAME["avx512"], 16, 4, (16, 12, 8, 6), (16, 8, 4, 4)),
    TileSet(BY_NAME["avx2"], 8, 2, (10, 6), (8, 4)),
    TileSet(BY_NAME["generic"], 4, 2, (10, 6), (4, 4)),
    TileSet(BFLOAT, 16, 4, (16, 12, 8, 6), (16, 8, 4, 4), pairs=True),
)
BFLOAT_SET = TILE_SETS[-1]


def product_block(emit: Emit, known: TileSet, size: int, width: int, left: tuple[Any, Any, int], right: tuple[Any, Any],
           depth: Any, before: list[Any], halves: bool = False) -> list[Any]:  # fmt: skip
    """``before`` plus the product of ``size`` rows and ``width`` vectors of columns.

    Args:
        left: the address of the first number, and bytes to the next row (a value or an int) and to the next column.
        right: the address of the first vector, and bytes to the next row of it.
        depth: what is summed over.
        halves: the numbers are pairs of bfloat16.
    """
    b, (base, row_step, column_step), (weight, weight_step) = emit.b, left, right
    unit, multiply = (I32, emit.multiply_add_halves) if halves else (F32, emit.fma)
    row_step, weight_step = (ir.Constant(I64, s) if isinstance(s, int) else s for s in (row_step, weight_step))
    sources = [emit.at(base, b.mul(row_step, ir.Constant(I64, r))) for r in range(size)]
    vectors = [4 * known.lanes * v for v in range(width)]

    def step(place: Any, unrolled: int, totals: list[Any]) -> list[Any]:
        totals = list(totals)
        at, offset = emit.at(weight, b.mul(place, weight_step)), emit.times(place, column_step)
        for u in range(unrolled):
            weights = [emit.load(at, vector(unit, known.lanes), each) for each in vectors]
            for r, source in enumerate(sources):
                value = emit.widen(emit.load(source, unit, emit.plus(offset, column_step * u)), known.lanes)
                for v, each in enumerate(weights):
                    totals[r * width + v] = multiply(value, each, totals[r * width + v])
            at = emit.at(at, weight_step)
        return totals

    whole = b.udiv(depth, ir.Constant(I64, _UNROLLED))
    totals = emit.loop(whole, before, lambda i, sums: step(emit.times(i, _UNROLLED), _UNROLLED, sums))
    done = emit.times(whole, _UNROLLED)
    return emit.loop(b.sub(depth, done), totals, lambda i, sums: step(b.add(done, i), 1, sums))


@intrinsic(prefer_literal=True)
def linear(typing_context: Any, known: Any, ending: Any, x: Any, x_row: Any, rows: Any, depth: Any, weight: Any,
           bias: Any, columns: Any, out: Any, out_row: Any) -> Any:  # fmt: skip
    """``out = ending(x @ weight + bias)`` for a tile of rows.

    All but the literals are int64, most of them addresses. Rows are done in whole blocks: the tiles have room for
    that, and what is in the last rows is of no account.

    Args:
        known: index into ``TILE_SETS``; ending: ``PLAIN``, ``GELU`` or ``GELU_HALVES``. These two are literal.
        x: float32, or pairs of bfloat16; x_row, out_row: bytes from one row to the next.
        depth: numbers, or pairs, of a row of x.
        weight: panel after panel, each ``(depth, panel)``. bias: float32. columns: a multiple of a panel.
        out: float32, or bfloat16.
    """
    chosen, last = TILE_SETS[known.literal_value], ending.literal_value
    size, width = chosen.linear_rows, chosen.width

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_row, rows, depth, weight, bias, columns, out, out_row = args[2:]
        emit, kind = Emit(builder, chosen.isa), vector(F32, chosen.lanes)
        offsets = [4 * chosen.lanes * v for v in range(width)]
        number, halves = 2 if last == GELU_HALVES else 4, vector(I16, chosen.lanes)
        blocks = builder.udiv(emit.plus(rows, size - 1), ir.Constant(I64, size))
        panel_bytes = builder.mul(depth, ir.Constant(I64, 4 * chosen.panel))

        def panel(p: Any, _: list[Any]) -> list[Any]:
            at = builder.add(weight, builder.mul(p, panel_bytes))
            first = emit.times(p, 4 * chosen.panel)
            start = [emit.load(emit.at(bias, first), kind, offset) for offset in offsets]

            def block(i: Any, _: list[Any]) -> list[Any]:
                source = emit.at(x, builder.mul(emit.times(i, size), x_row))
                target = emit.at(
                    emit.at(out, emit.times(p, number * chosen.panel)), builder.mul(emit.times(i, size), out_row)
                )
                right = emit.at(at, 0), 4 * chosen.panel
                totals = product_block(
                    emit, chosen, size, width, (source, x_row, 4), right, depth, start * size, chosen.pairs
                )  # fmt: skip
                for r in range(size):
                    place = emit.at(target, builder.mul(out_row, ir.Constant(I64, r)))
                    for total, offset in zip(totals[r * width : (r + 1) * width], offsets, strict=True):
                        ended = total if last == PLAIN else gelu(emit, total)
                        if last == GELU_HALVES:
                            ended = builder.bitcast(builder.fptrunc(ended, vector(BF16, chosen.lanes)), halves)
                        emit.store(ended, place, offset * number // 4)
                return []

            emit.loop(blocks, [], block)
            return []

        emit.loop(builder.udiv(columns, ir.Constant(I64, chosen.panel)), [], panel)
        return context.get_dummy_value()

    return types.void(known, ending, *([types.int64] * 9)), generate


@intrinsic(prefer_literal=True)
def turn_queries(typing_context: Any, known: Any, head_size: Any, source: Any, row: Any, groups: Any, scale: Any,
                 target: Any) -> Any:  # fmt: skip
    """Queries of one head with every lane a query: ``target[c, j] = scale * source[j, c]``.

    Args:
        known, head_size: literal; the head is whole vectors of channels.
        source: int64 address of the first query; row: bytes to the next.
        groups: vectors of queries; those of the last one that are not there have room and are of no account.
        scale: float32. target: ``(head_size, panel)``.
    """
    chosen, depth = TILE_SETS[known.literal_value], head_size.literal_value
    lanes = chosen.lanes
    low = [place for i in range(lanes // 2) for place in (i, lanes + i)]
    high = [place + lanes // 2 for place in low]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, row, groups, scale, target = args[2:]
        emit, kind = Emit(builder, chosen.isa), vector(F32, lanes)
        factor = emit.widen(scale, lanes)

        def group(i: Any, _: list[Any]) -> list[Any]:
            first = emit.at(source, builder.mul(emit.times(i, lanes), row))
            out = emit.at(target, emit.times(i, 4 * lanes))
            for c in range(0, depth, lanes):
                vectors = [
                    emit.load(emit.at(first, builder.mul(row, ir.Constant(I64, j))), kind, 4 * c) for j in range(lanes)
                ]
                span = lanes
                while span > 1:  # interleaving the first half with the second, once for each bit of a lane's number
                    halves = list(zip(vectors[: lanes // 2], vectors[lanes // 2 :], strict=True))
                    vectors = [emit.shuffle(a, b, order) for a, b in halves for order in (low, high)]
                    span //= 2
                for j, each in enumerate(vectors):
                    emit.store(builder.fmul(each, factor), out, 4 * chosen.panel * (c + j))
            return []

        emit.loop(groups, [], group)
        return context.get_dummy_value()

    return types.void(known, head_size, *([types.int64] * 3), types.float32, types.int64), generate


def score_rows(emit: Emit, known: TileSet, width: int, depth: int, rows: tuple[Any, Any], turned: Any, target: Any,
               count: Any) -> None:  # fmt: skip
    """``target (count, panel)``: products of ``count`` rows with ``width`` vectors of ``turned (depth, panel)``.

    ``rows``: the address of the first, and bytes to the next. Whole blocks of rows are read and written.
    """
    size, step, (first_row, row) = known.rows[width - 1], 4 * known.panel, rows
    zero = constant(0.0, vector(F32, known.lanes))

    def block(i: Any, _: list[Any]) -> list[Any]:
        first = emit.times(i, size)
        left = emit.at(first_row, emit.b.mul(first, row)), row, 4
        depth_value = ir.Constant(I64, depth)
        totals = product_block(emit, known, size, width, left, (turned, step), depth_value, [zero] * (size * width))
        at = emit.at(target, emit.times(first, step))
        for place, total in enumerate(totals):
            emit.store(total, at, place // width * step + place % width * 4 * known.lanes)
        return []

    emit.loop(emit.b.udiv(emit.plus(count, size - 1), ir.Constant(I64, size)), [], block)


def largest_scores(emit: Emit, known: TileSet, width: int, scores: Any, count: Any) -> list[Any]:
    """Of each lane, over ``count`` rows of ``scores (count, panel)``; what is no number is passed over."""
    kind, step = vector(F32, known.lanes), 4 * known.panel
    offsets = [4 * known.lanes * v for v in range(width)]

    def look(i: Any, best: list[Any]) -> list[Any]:
        at = emit.at(scores, emit.times(i, step))
        return [larger(emit, each, emit.load(at, kind, offset)) for each, offset in zip(best, offsets, strict=True)]

    return emit.loop(count, [constant(LOWEST_FLOAT, kind)] * width, look)


@intrinsic(prefer_literal=True)
def attend(typing_context: Any, known: Any, width: Any, head_size: Any, queries: Any, count: Any, keys: Any,
           values: Any, row: Any, members: Any, scores: Any, sums: Any, out: Any, out_row: Any) -> Any:  # fmt: skip
    """Attention of one head for ``width`` vectors of queries: every lane is a query, so that nothing is summed across.

    All but the literals are int64, most of them addresses of float32.

    Args:
        known: index into ``TILE_SETS``; width: vectors of queries; head_size. These three are literal.
        queries: ``(head_size, panel)``, scaled by ``log2(e)`` and what else scores are scaled by.
        count: how many of them there are; outputs are written for whole vectors, and are of no account beyond it.
        keys, values: of the first member; row: bytes to the next. Rows of whole blocks are read, and of a value whole
            vectors.
        members: how many.
        scores: room for ``(members, panel)``, rows rounded up to a block; sums: for a panel.
        out: of the first query; out_row: bytes to the next. Whole vectors of channels are written.
    """
    chosen, wide, depth = TILE_SETS[known.literal_value], width.literal_value, head_size.literal_value
    lanes, step = chosen.lanes, 4 * chosen.panel
    vectors = -(-depth // lanes)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        queries, count, keys, values, row, members, scores, sums, out, out_row = args[3:]
        emit, kind = Emit(builder, chosen.isa), vector(F32, lanes)
        zero = ir.Constant(kind, [0.0] * lanes)
        queries, keys, values, scores, sums, out = (
            emit.at(each, 0) for each in (queries, keys, values, scores, sums, out)
        )
        offsets = [4 * lanes * v for v in range(wide)]

        score_rows(emit, chosen, wide, depth, (keys, row), queries, scores, members)
        largest = largest_scores(emit, chosen, wide, scores, members)

        def weigh(i: Any, totals: list[Any]) -> list[Any]:
            at = emit.at(scores, emit.times(i, step))
            added = []
            for total, best, offset in zip(totals, largest, offsets, strict=True):
                weight = power_of_two(emit, builder.fsub(emit.load(at, kind, offset), best))
                emit.store(weight, at, offset)
                added.append(builder.fadd(total, weight))
            return added

        one = ir.Constant(kind, [1.0] * lanes)
        for total, offset in zip(emit.loop(members, [zero] * wide, weigh), offsets, strict=True):
            emit.store(builder.fdiv(one, total), sums, offset)

        done = 0
        while done < vectors:
            some = min(chosen.width, vectors - done)
            high, first_vector = chosen.outputs[some - 1], 4 * lanes * done

            def gather(i: Any, _: list[Any], some: int = some, high: int = high, at: int = first_vector) -> list[Any]:
                first = emit.times(i, high)
                left = emit.at(scores, emit.times(first, 4)), 4, step
                totals = product_block(
                    emit, chosen, high, some, left, (emit.at(values, at), row), members, [zero] * high * some
                )
                target = emit.at(emit.at(out, at), builder.mul(first, out_row))
                for r in range(high):
                    factor = emit.widen(emit.load(sums, F32, emit.times(emit.plus(first, r), 4)), lanes)
                    place = emit.at(target, builder.mul(out_row, ir.Constant(I64, r)))
                    for v in range(some):
                        emit.store(builder.fmul(totals[r * some + v], factor), place, 4 * lanes * v)
                return []

            emit.loop(builder.udiv(emit.plus(count, high - 1), ir.Constant(I64, high)), [], gather)
            done += some
        return context.get_dummy_value()

    return types.void(known, width, head_size, *([types.int64] * 10)), generate
