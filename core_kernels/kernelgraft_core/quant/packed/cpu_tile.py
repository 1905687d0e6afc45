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

from kernelgraft_core.runtime.cpu_vectors import (
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

QUAD = 4  # weight rows that are done together, and the least there must be
PANEL = 32  # weight rows whose scales are unpacked together; their words stay in the second-level cache


@dataclass(frozen=True)
class Tile:
    """QUAD weight rows times ``tokens`` tokens.

    Attributes:
        bits: of a weight.
        vectors: of ``4 * lanes`` weights that a block of activations spans;
        parts: or blocks that a vector spans, where it is larger than a block.
    """

    isa: InstructionSet
    bits: int
    tokens: int
    vectors: int
    parts: int

    @property
    def low_bits(self) -> int:
        """Bits of a weight that are in ``qweight``."""
        return 2 if self.bits == 3 else 4

    @property
    def sums(self) -> int:
        """Lanes of an int32 or float32 vector."""
        return self.isa.lanes // 2

    @property
    def narrow(self) -> Tile:
        """The same tile on half a vector."""
        return Tile(self.isa.narrow, self.bits, self.tokens, 1, self.parts // 2)


@dataclass(frozen=True)
class _Rows:
    """Where four rows of a weight are: their planes, then scales and shifts (scale times zero point), all ``i8*``."""

    words: list[list[Any]]
    scale: Any
    shift: Any
    blocks: Any
    row_bytes: Any


@dataclass(frozen=True)
class _Tokens:
    """Where a tile of activations is, ``i8*``; see :func:`multiply_panel`."""

    x: Any
    scale: Any
    shift: Any


def unpack_planes(emit: Emit, bits: int, words: list[Any], index: Any) -> list[Any]:
    """The four planes of vector ``index`` of a row; ``words`` are where the row's packed planes begin."""
    b, lanes = emit.b, emit.isa.lanes
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


def _shifts(emit: Emit, tile: Tile, rows: _Rows, tokens: _Tokens, padded: Any) -> list[Any]:
    """What zero points take away, for each token and row: a vector whose lanes have to be added up."""
    b, kind = emit.b, vector(F32, tile.sums)
    numbers = ir.Constant(vector(I64, tile.sums), list(range(tile.sums)))

    def add(i: Any, totals: list[Any]) -> list[Any]:
        first = emit.times(i, tile.sums)
        inside = b.icmp_signed("<", numbers, emit.widen(b.sub(rows.blocks, first), tile.sums))
        shifts = []
        for r in range(QUAD):
            loaded = emit.load(rows.shift, kind, emit.times(b.add(emit.times(rows.blocks, r), first), 4))
            shifts.append(b.select(inside, loaded, constant(0.0, kind)))
        results = []
        for m in range(tile.tokens):
            token = emit.load(tokens.shift, kind, emit.times(b.add(emit.times(padded, m), first), 4))
            results += [emit.fma(shifts[r], token, totals[m * QUAD + r]) for r in range(QUAD)]
        return results

    runs = b.udiv(padded, ir.Constant(I64, tile.sums))
    return emit.loop(runs, [constant(0.0, kind)] * (tile.tokens * QUAD), add)


def _add_step(
    emit: Emit, tile: Tile, rows: _Rows, totals: list[Any], at: tuple[Any, Any], x: Any, scales: Any
) -> list[Any]:
    """Multiply one step - a block of every token, or the blocks of one vector - and add it to ``totals``.

    ``at``: the step's first vector and first block. ``x``: address of its activations. ``scales``: a vector by token.
    """
    b, kind = emit.b, vector(I16, emit.isa.lanes)
    products: list[Any] = [None] * (tile.tokens * QUAD)
    for v in range(tile.vectors):
        here = emit.plus(at[0], v)
        if tile.tokens == 1 and v * emit.isa.lanes % 32 == 0:
            # The next four rows: each row is too short for the hardware to notice a stream before it ends.
            ahead = b.add(emit.times(here, emit.isa.lanes // 2 * tile.low_bits), emit.times(rows.row_bytes, QUAD))
            for words in rows.words:
                emit.prefetch(words[0], ahead)
        weights = [unpack_planes(emit, tile.bits, words, here) for words in rows.words]
        for plane in range(4):
            for m in range(tile.tokens):
                values = emit.load(x, kind, 2 * emit.isa.lanes * (4 * (v * tile.tokens + m) + plane))
                for r in range(QUAD):
                    which = m * QUAD + r
                    products[which] = emit.multiply_add(weights[r][plane], values, products[which])
    row_kind = F32 if tile.parts == 1 else vector(F32, tile.parts)
    row_scales = []
    for r in range(QUAD):
        first = emit.times(b.add(emit.times(rows.blocks, r), at[1]), 4)
        row_scales.append(emit.widen(emit.load(rows.scale, row_kind, first), tile.sums))
    results = []
    for m in range(tile.tokens):
        for r in range(QUAD):
            product = b.sitofp(products[m * QUAD + r], vector(F32, tile.sums))
            results.append(emit.fma(b.fmul(product, row_scales[r]), scales[m], totals[m * QUAD + r]))
    return results


def _multiply(emit: Emit, tile: Tile, rows: _Rows, tokens: _Tokens, padded: Any, steps: Any, half: Any) -> list[Any]:
    """For each token, the products with four rows in a vector of four."""
    b, spread = emit.b, 1 if tile.parts == 1 else tile.sums
    x_bytes, scale_bytes = 8 * tile.isa.lanes * tile.tokens * tile.vectors, 4 * tile.tokens * spread

    def add(i: Any, totals: list[Any]) -> list[Any]:
        x, scale = emit.at(tokens.x, emit.times(i, x_bytes)), emit.at(tokens.scale, emit.times(i, scale_bytes))
        kind = F32 if spread == 1 else vector(F32, spread)
        scales = [emit.widen(emit.load(scale, kind, 4 * spread * m), tile.sums) for m in range(tile.tokens)]
        return _add_step(emit, tile, rows, totals, (emit.times(i, tile.vectors), emit.times(i, tile.parts)), x, scales)

    totals = emit.loop(steps, _shifts(emit, tile, rows, tokens, padded), add)
    if tile.parts > 1 and tile.isa.lanes == 32:
        narrow = Emit(b, tile.isa.narrow)

        def add_half(_: Any, totals: list[Any]) -> list[Any]:
            x = narrow.at(tokens.x, emit.times(steps, x_bytes))
            scale = narrow.at(tokens.scale, emit.times(steps, scale_bytes))
            scales = [narrow.load(scale, vector(F32, spread // 2), 4 * spread * m) for m in range(tile.tokens)]
            at = emit.times(steps, 2), emit.times(steps, tile.parts)
            return _add_step(narrow, tile.narrow, rows, totals, at, x, scales)

        totals = narrow.loop(half, [emit.halves_added(each) for each in totals], add_half)
    return [emit.sums_of_four(totals[m * QUAD : (m + 1) * QUAD]) for m in range(tile.tokens)]


@intrinsic(prefer_literal=True)
def multiply_panel(typing_context: Any, isa: Any, bits: Any, tokens: Any, vectors: Any, parts: Any,
                   words: Any, high: Any, k: Any, w_scale: Any, w_shift: Any, width: Any, x: Any, x_scale: Any,
                   x_shift: Any, blocks: Any, padded: Any, steps: Any, half: Any, out: Any) -> Any:  # fmt: skip
    """Write the products of ``width`` weight rows and a tile of tokens, float32 ``(tokens, PANEL)``, to ``out``.

    All but the literals are int64, most of them addresses. The last QUAD rows overlap those before where ``width`` is
    not a multiple of QUAD.

    Args:
        isa: index into ``INSTRUCTION_SETS``; it and those up to ``parts`` are literal, see :class:`Tile`.
        words, high: where the first row begins in ``qweight``, and in the ``qhigh`` of 3-bit weights.
        w_scale, w_shift: float32 ``(width, blocks)``: scales of the weight, and those times the zero points. Readable
            for half as many floats more as a vector has lanes.
        x: int16 activations ``(K / (4 * lanes), tokens, 4 planes, lanes)``; a last half vector has half the lanes.
        x_scale: float32 ``(steps, tokens)``; where a vector spans several blocks ``(steps, tokens, lanes / 2)``.
        x_shift: float32 ``(tokens, padded)``: each block's scale times the sum of its integers, negative; then zeros.
        steps: blocks, or vectors where a vector spans several; without the last half vector.
        half: 1 where half a vector follows them, else 0.
    """
    tile = Tile(INSTRUCTION_SETS[isa.literal_value], *(each.literal_value for each in (bits, tokens, vectors, parts)))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, high, k, w_scale, w_shift, width, x, x_scale, x_shift, blocks, padded, steps, half, out = args[5:]
        emit = Emit(builder, tile.isa)
        row_bytes, high_bytes = (builder.udiv(k, ir.Constant(I64, 8 // each)) for each in (tile.low_bits, 1))
        activations = _Tokens(*(emit.at(address, 0) for address in (x, x_scale, x_shift)))

        def quad(i: Any, _: list[Any]) -> list[Any]:
            row, last = emit.times(i, QUAD), emit.plus(width, -QUAD)
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            planes = []
            for r in range(QUAD):
                at, at_high = (builder.mul(emit.plus(row, r), each) for each in (row_bytes, high_bytes))
                planes.append([emit.at(words, at), emit.at(high, at_high)])
            scales_at = emit.times(builder.mul(row, blocks), 4)
            rows = _Rows(planes, emit.at(w_scale, scales_at), emit.at(w_shift, scales_at), blocks, row_bytes)
            for m, four in enumerate(_multiply(emit, tile, rows, activations, padded, steps, half)):
                emit.store(four, emit.at(out, emit.times(row, 4)), 4 * PANEL * m)
            return []

        emit.loop(builder.udiv(emit.plus(width, QUAD - 1), ir.Constant(I64, QUAD)), [], quad)
        return context.get_dummy_value()

    return types.void(isa, bits, tokens, vectors, parts, *([types.int64] * 14)), generate
