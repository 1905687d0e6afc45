"""The inner loop of the packed linear layers on a CPU: a few weight rows times a few tokens, in LLVM instructions.

A vector holds ``lanes`` integers of 16 bits. Packed words, shifted and masked, leave four vectors of weights, planes
0 to 3: lane ``2 t + h`` of plane ``p`` is element ``8 t + 2 p + h`` of ``4 * lanes`` neighbours along K
(:mod:`kernelgraft_core.quant.interleave`). Lane ``t`` of their int32 sums then covers elements ``8 t`` to ``8 t + 7``,
so scales of groups smaller than a vector are spread over its lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .cpu_vectors import F32, I16, I32, I64, INSTRUCTION_SETS, Emit, InstructionSet, constant, vector

PANEL_WIDTH = 36  # floats in a row of the buffer that tiles write to


@dataclass(frozen=True)
class Tile:
    """``rows`` weight rows times ``tokens`` tokens; one of the two is 4 and the other 1, or more.

    Attributes:
        bits: of a weight.
        vectors: of ``4 * lanes`` weights that a block of activations spans;
        parts: or blocks that a vector spans, where it is larger than a block.
    """

    isa: InstructionSet
    bits: int
    rows: int
    tokens: int
    vectors: int
    parts: int

    @property
    def narrow(self) -> Tile:
        """The same tile on half a vector."""
        return Tile(self.isa.narrow, self.bits, self.rows, self.tokens, 1, self.parts // 2)


def _unpack(emit: Emit, bits: int, words: list[Any], index: Any, lanes: int) -> list[Any]:
    """The four planes of vector ``index`` of a row; ``words`` are where the row's packed planes begin."""
    b = emit.b
    if bits == 4:
        nibbles = emit.load(words[0], vector(I16, lanes), emit.times(index, 2 * lanes))
        planes = [emit.shift_right(nibbles, 4 * plane) for plane in range(4)]
        return [*(emit.mask(each, 15) for each in planes[:3]), planes[3]]
    # A word of low bits holds sixteen elements, eight to a half. Spread to 64 bits, with bits 8 to 31 repeated above,
    # each of its four bytes begins a lane.
    low = b.zext(emit.load(words[0], vector(I32, lanes // 4), emit.times(index, lanes)), vector(I64, lanes // 4))
    low = b.bitcast(b.or_(low, b.shl(low, constant(24, low.type))), vector(I16, lanes))
    # A word of top bits holds 32 elements; every fourth of its bits begins a pair of lanes.
    spread = vector(I32, lanes // 2)
    high = emit.widen(emit.load(words[1], vector(I32, lanes // 8), emit.times(index, lanes // 2)), lanes // 2)
    high = b.lshr(high, ir.Constant(spread, [4 * (lane % 4) for lane in range(lanes // 2)]))
    high = b.bitcast(high, vector(I16, lanes))
    planes = []
    for plane in range(4):
        top = b.shl(high, constant(2 - plane, high.type)) if plane < 2 else emit.shift_right(high, plane - 2)
        planes.append(b.or_(emit.mask(emit.shift_right(low, 2 * plane), 3), emit.mask(top, 4)))
    return planes


class _Step:
    """Multiplies one block of every token, or the blocks of one vector, and adds it to running sums."""

    def __init__(self, emit: Emit, tile: Tile, args: dict[str, Any]) -> None:
        self.emit, self.tile = emit, tile
        self.x, self.x_scale, self.w_scale = args["x"], args["x_scale"], args["w_scale"]
        self.words, self.row_blocks, self.row_bytes = args["words"], args["blocks"], args["row_bytes"]

    def add(self, sums: list[Any], vector_index: Any, x: Any, x_scale: Any, block: Any) -> list[Any]:
        """Args: ``sums``: by row, then token. ``x``, ``x_scale``: addresses. ``block``: the first, of each row."""
        emit, tile, b = self.emit, self.tile, self.emit.b
        lanes, sums_lanes = tile.isa.lanes, tile.isa.lanes // 2
        totals: list[Any] = [None] * len(sums)
        for v in range(tile.vectors):
            here = emit.plus(vector_index, v)
            if tile.tokens == 1 and v * lanes % 32 == 0:
                # The next rows: each row is too short for the hardware to notice a stream before it ends.
                for row in self.words:
                    ahead = b.add(emit.times(here, lanes // 2 * tile.bits), emit.times(self.row_bytes, tile.rows))
                    emit.prefetch(row[0], ahead)
            weights = [_unpack(emit, tile.bits, row, here, lanes) for row in self.words]
            for plane in range(4):
                for m in range(tile.tokens):
                    at = 2 * lanes * (4 * (v * tile.tokens + m) + plane)
                    values = emit.load(x, vector(I16, lanes), at)
                    for r in range(tile.rows):
                        which = r * tile.tokens + m
                        totals[which] = emit.multiply_add(weights[r][plane], values, totals[which])
        kind = F32 if tile.parts == 1 else vector(F32, tile.parts)
        results = []
        for r in range(tile.rows):
            at_row = b.add(b.mul(self.row_blocks, ir.Constant(I64, r)), block)
            row_scale = emit.widen(emit.load(self.w_scale, kind, emit.times(at_row, 4)), sums_lanes)
            for m in range(tile.tokens):
                which = r * tile.tokens + m
                scaled = b.fmul(b.sitofp(totals[which], vector(F32, sums_lanes)), row_scale)
                results.append(emit.fma(scaled, self.token_scale(x_scale, m), sums[which]))
        return results

    def token_scale(self, x_scale: Any, m: int) -> Any:
        lanes = self.tile.isa.lanes // 2
        if self.tile.parts == 1:
            return self.emit.widen(self.emit.load(x_scale, F32, 4 * m), lanes)
        return self.emit.load(x_scale, vector(F32, lanes), 4 * lanes * m)


class _Tail(_Step):
    """The last half of a vector; its scales have been spread over a whole one."""

    def token_scale(self, x_scale: Any, m: int) -> Any:
        return self.emit.load(x_scale, vector(F32, 8), 64 * m)


def _shifts(emit: Emit, tile: Tile, args: dict[str, Any], x_shift: Any, w_shift: Any, padded: Any) -> list[Any]:
    """Running sums at the start: what zero points take away, summed over blocks, some in each lane."""
    b, lanes = emit.b, tile.isa.lanes // 2
    kind = vector(F32, lanes)
    numbers = ir.Constant(vector(I64, lanes), list(range(lanes)))

    def add(i: Any, sums: list[Any]) -> list[Any]:
        first = emit.times(i, lanes)
        inside = b.icmp_signed("<", numbers, emit.widen(b.sub(args["blocks"], first), lanes))
        results = []
        for r in range(tile.rows):
            at = b.add(b.mul(args["blocks"], ir.Constant(I64, r)), first)
            row = b.select(inside, emit.load(w_shift, kind, emit.times(at, 4)), constant(0.0, kind))
            for m in range(tile.tokens):
                at = b.add(b.mul(padded, ir.Constant(I64, m)), first)
                token = emit.load(x_shift, kind, emit.times(at, 4))
                results.append(emit.fma(row, token, sums[r * tile.tokens + m]))
        return results

    return emit.loop(b.sdiv(padded, ir.Constant(I64, lanes)), [constant(0.0, kind)] * (tile.rows * tile.tokens), add)


def _emit_tile(emit: Emit, tile: Tile, values: Any) -> None:
    b, isa = emit.b, tile.isa
    words, row_bytes, high, high_bytes, x, x_scale, x_shift, w_scale, w_shift, blocks, padded, steps, half, out = values
    rows = [[emit.at(words, b.mul(row_bytes, ir.Constant(I64, r)))] for r in range(tile.rows)]
    if tile.bits == 3:
        for r, row in enumerate(rows):
            row.append(emit.at(high, b.mul(high_bytes, ir.Constant(I64, r))))
    x, x_scale, x_shift, w_scale, w_shift, out = (emit.at(a, 0) for a in (x, x_scale, x_shift, w_scale, w_shift, out))
    args = {"x": x, "x_scale": x_scale, "w_scale": w_scale, "words": rows, "blocks": blocks, "row_bytes": row_bytes}
    step = _Step(emit, tile, args)
    x_bytes = 8 * isa.lanes * tile.tokens * tile.vectors
    scale_bytes = 4 * tile.tokens * (1 if tile.parts == 1 else isa.lanes // 2)

    def add(i: Any, sums: list[Any]) -> list[Any]:
        x_here, scale_here = emit.at(x, emit.times(i, x_bytes)), emit.at(x_scale, emit.times(i, scale_bytes))
        return step.add(sums, emit.times(i, tile.vectors), x_here, scale_here, emit.times(i, tile.parts))

    sums = emit.loop(steps, _shifts(emit, tile, args, x_shift, w_shift, padded), add)
    if tile.parts > 1 and isa.lanes == 32:
        sums = [emit.halves_added(each) for each in sums]
        narrow = Emit(b, isa.narrow)
        tail = _Tail(narrow, tile.narrow, args)

        def add_half(i: Any, sums: list[Any]) -> list[Any]:
            x_here, scale_here = (
                emit.at(x, emit.times(steps, x_bytes)),
                emit.at(x_scale, emit.times(steps, scale_bytes)),
            )
            return tail.add(sums, emit.times(steps, 2), x_here, scale_here, emit.times(steps, tile.parts))

        sums = narrow.loop(half, sums, add_half)
    if tile.tokens == 1:
        for first in range(0, tile.rows, 4):
            emit.store(emit.sums_of_four(sums[first : first + 4]), out, 4 * first)
        return
    for r in range(tile.rows):
        for first in range(0, tile.tokens, 4):
            four = emit.sums_of_four(sums[r * tile.tokens + first : r * tile.tokens + first + 4])
            for m in range(4):
                element = b.extract_element(four, ir.Constant(I32, m))
                emit.store(element, out, 4 * (PANEL_WIDTH * (first + m) + r))


@intrinsic(prefer_literal=True)
def multiply_tile(typing_context: Any, isa: Any, bits: Any, rows: Any, tokens: Any, vectors: Any, parts: Any,
                  words: Any, row_bytes: Any, high: Any, high_bytes: Any, x: Any, x_scale: Any, x_shift: Any,
                  w_scale: Any, w_shift: Any, blocks: Any, padded: Any, steps: Any, half: Any, out: Any) -> Any:  # fmt: skip
    """Write the products of a tile, float32, to ``out``: row ``r`` of token ``m`` at ``PANEL_WIDTH * m + r``.

    Args:
        isa: index into ``INSTRUCTION_SETS``; it and those up to ``parts`` are literal: :class:`Tile`.
        words, row_bytes: where the first row of ``qweight`` begins, and its bytes; ``high`` likewise of ``qhigh``.
        x: int16 activations ``(vectors, tokens, 4 planes, lanes)``; a last half vector has half the lanes.
        x_scale: float32 ``(steps, tokens)``; where a vector spans several blocks ``(steps, tokens, lanes / 2)``.
        x_shift: float32 ``(tokens, padded)``: each block's scale times the sum of its integers, negative; then zeros.
        w_scale, w_shift: float32 ``(rows, blocks)``: scales of the weight, and those times the zero points. Readable
            for 16 floats more.
        steps: blocks, or vectors where a vector spans several; without the last half vector.
        half: 1 where half a vector follows them, else 0.
    """
    literal = [each.literal_value for each in (isa, bits, rows, tokens, vectors, parts)]
    tile = Tile(INSTRUCTION_SETS[literal[0]], *literal[1:])

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_tile(Emit(builder, tile.isa), tile, args[6:])
        return context.get_dummy_value()

    return types.void(isa, bits, rows, tokens, vectors, parts, *([types.int64] * 14)), generate
