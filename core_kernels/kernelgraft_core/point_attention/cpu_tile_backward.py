"""The gradient of attention of one head, in LLVM instructions; see :mod:`.cpu_tile`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernelgraft_core.runtime.cpu_vectors import F32, I64, Emit, constant, vector

from .cpu_math import power_of_two
from .cpu_tile import TILE_SETS, TileSet, largest_scores, product_block, score_rows


@intrinsic(prefer_literal=True)
def attend_backward(typing_context: Any, known: Any, width: Any, head_size: Any, turned: Any, turned_grad: Any,
                    scale: Any, rows: Any, row: Any, grad: Any, grad_row: Any, third: Any, count: Any, members: Any,
                    first: Any, weights: Any, moved: Any, found: Any, found_row: Any,
                    found_third: Any) -> Any:  # fmt: skip
    """Gradients of one head of a group for ``width`` vectors of its queries, of which every lane is one.

    All but the literals and ``scale`` are int64, most of them addresses of float32.

    Args:
        known: index into ``TILE_SETS``; width: vectors of queries; head_size. These three are literal.
        turned: these queries, ``(head_size, panel)``, scaled by ``log2(e)`` and ``scale``; turned_grad: the gradient of
            the output of the same, not scaled.
        scale: float32, of scores.
        rows: the group's first query; row: bytes to the next; third: bytes from a query to its key, and to its value.
        grad: the gradient of the output of the group's first query; grad_row: bytes to the next.
        count: how many queries; first: which is the first of them. members: how many keys.
        weights, moved: room for ``(members, panel)`` each, rows rounded up to a block.
        found: the gradient of the group's first query; found_row, found_third: as of ``rows``. Gradients of keys and
            values are added to, but begin with the first query. Whole blocks of rows and vectors are written.
    """
    chosen, wide, depth = TILE_SETS[known.literal_value], width.literal_value, head_size.literal_value
    lanes, step = chosen.lanes, 4 * chosen.panel

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (turned, turned_grad, scale, rows, row, grad, grad_row, third, count, members, first, weights, moved, found,
         found_row, found_third) = args[3:]  # fmt: skip
        emit, kind, b = Emit(builder, chosen.isa), vector(F32, lanes), builder
        turned, turned_grad, rows, grad, weights, moved, found = (
            emit.at(each, 0) for each in (turned, turned_grad, rows, grad, weights, moved, found)
        )
        offsets, zero = [4 * lanes * v for v in range(wide)], constant(0.0, kind)
        keys, values = emit.at(rows, third), emit.at(emit.at(rows, third), third)
        score_rows(emit, chosen, wide, depth, (keys, row), turned, weights, members)
        score_rows(emit, chosen, wide, depth, (values, row), turned_grad, moved, members)
        largest = largest_scores(emit, chosen, wide, weights, members)

        def weigh(i: Any, sums: list[Any]) -> list[Any]:
            """Weights not yet divided by their sum, that sum, and the sum of their products with their gradients."""
            at, at_moved = (emit.at(each, emit.times(i, step)) for each in (weights, moved))
            added = []
            for v, offset in enumerate(offsets):
                weight = power_of_two(emit, b.fsub(emit.load(at, kind, offset), largest[v]))
                emit.store(weight, at, offset)
                products = emit.fma(weight, emit.load(at_moved, kind, offset), sums[2 * v + 1])
                added += [b.fadd(sums[2 * v], weight), products]
            return added

        sums = emit.loop(members, [zero] * (2 * wide), weigh)
        inverses = [b.fdiv(constant(1.0, kind), total) for total in sums[::2]]
        deltas = [b.fmul(products, inverse) for products, inverse in zip(sums[1::2], inverses, strict=True)]
        factor = emit.widen(scale, lanes)

        def move(i: Any, _: list[Any]) -> list[Any]:
            at, at_moved = (emit.at(each, emit.times(i, step)) for each in (weights, moved))
            for v, offset in enumerate(offsets):
                weight = b.fmul(emit.load(at, kind, offset), inverses[v])
                emit.store(weight, at, offset)
                change = b.fsub(emit.load(at_moved, kind, offset), deltas[v])
                emit.store(b.fmul(b.fmul(weight, factor), change), at_moved, offset)
            return []

        emit.loop(members, [], move)
        query = emit.at(rows, b.mul(first, row))
        _combine(emit, chosen, chosen.outputs, depth, count, (moved, 4, step), (keys, row), members,
                 (emit.at(found, b.mul(first, found_row)), found_row), None)  # fmt: skip
        begins = b.icmp_signed("==", first, ir.Constant(I64, 0))
        for_keys = emit.at(found, found_third)
        _combine(emit, chosen, chosen.rows, depth, members, (moved, step, 4), (query, row), count,
                 (for_keys, found_row), begins)  # fmt: skip
        change_rows = emit.at(grad, b.mul(first, grad_row)), grad_row
        _combine(emit, chosen, chosen.rows, depth, members, (weights, step, 4), change_rows, count,
                 (emit.at(for_keys, found_third), found_row), begins)  # fmt: skip
        return context.get_dummy_value()

    integers = [types.int64] * 13
    return types.void(known, width, head_size, types.int64, types.int64, types.float32, *integers), generate


def _combine(emit: Emit, known: TileSet, sizes: tuple[int, ...], depth: int, rows: Any, left: tuple[Any, int, int],
             right: tuple[Any, Any], count: Any, target: tuple[Any, Any], begins: Any) -> None:  # fmt: skip
    """``target = left @ right``, ``rows`` rows of ``depth`` channels, or added to it where ``begins`` is false.

    ``sizes``: rows of a block for each number of vectors. ``begins`` None: there is nothing to add to.
    """
    b, kind, (base, row_step, column_step), (out, out_row) = emit.b, vector(F32, known.lanes), left, target
    zero, done, vectors = constant(0.0, kind), 0, -(-depth // known.lanes)
    while done < vectors:
        some = min(known.width, vectors - done)
        size, at = sizes[some - 1], 4 * known.lanes * done

        def block(i: Any, _: list[Any], some: int = some, size: int = size, at: int = at) -> list[Any]:
            first = emit.times(i, size)
            start = emit.at(emit.at(out, at), b.mul(first, out_row))
            places = [
                (emit.at(start, b.mul(out_row, ir.Constant(I64, r))), 4 * known.lanes * v)
                for r in range(size)
                for v in range(some)
            ]
            before = [zero] * len(places)
            if begins is not None:
                before = [b.select(begins, zero, emit.load(place, kind, offset)) for place, offset in places]
            source = emit.at(base, emit.times(first, row_step)), row_step, column_step
            other = emit.at(right[0], at), right[1]
            totals = product_block(emit, known, size, some, source, other, count, before)
            for total, (place, offset) in zip(totals, places, strict=True):
                emit.store(total, place, offset)
            return []

        emit.loop(b.udiv(emit.plus(rows, size - 1), ir.Constant(I64, size)), [], block)
        done += some
