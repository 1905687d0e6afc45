"""The inner loop of W4A8 and W8A8 on a CPU: panels of 16 weight rows times a few tokens, in LLVM instructions.

A panel keeps four neighbours along K of each of its rows side by side, so that one vector of bytes times four
activations, repeated in every lane, adds to one int32 per row: nothing has to be summed across lanes, and a weight is
read as one stream. These forms of weight share the loop:

* BYTES: uint8 ``(K / 4, 16, 4)``, the int8 of the weight plus 128;
* NIBBLES: uint8 ``(K / 8, 16, 4)``, whose low nibbles are elements ``8 i + j`` and whose high ones ``8 i + 4 + j``, as
  they are: per-channel weights, whose zero points are left for later;
* GROUPS: the same, and a scale and a zero point per group of columns, with which nibbles become the bytes of BYTES in
  two instructions for 64: one 16-bit product scales two nibbles, which stay apart because no result exceeds a byte;
* GROUP_SUMS: the same weight, whose nibbles are multiplied as they are, while scales and zero points enter once per
  group, with the sums of its activations: less work as long as there are few tokens.

Processors without products of unsigned and signed bytes that add to int32 get the magnitudes of the weight and
activations with its sign: ``vpmaddubsw`` adds two such products in 16 bits, where those of unsigned bytes overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernelgraft_core.runtime.cpu_vectors import BY_NAME, I16, I32, I64, Emit, InstructionSet, constant, vector

from .cpu_panels import BYTES, GROUP_SUMS, GROUPS, ROWS

I8 = ir.IntType(8)
SHIFT = 128  # what makes an int8 weight unsigned
SUMMED_TILES = (2, 1)  # numbers of tokens for which GROUP_SUMS is less work than GROUPS; each ByteSet has them


@dataclass(frozen=True)
class ByteSet:
    """How a processor multiplies bytes: vectors of ``lanes`` int32, with one instruction or with three."""

    isa: InstructionSet
    panels: int  # that are done together
    tiles: tuple[int, ...]  # numbers of tokens that are done together, the largest first

    @property
    def lanes(self) -> int:
        return self.isa.lanes // 2


BYTE_SETS = (  # the best first
    ByteSet(BY_NAME["avx512vnni"], 2, (12, 8, 4, 2, 1)),
    ByteSet(BY_NAME["avxvnni"], 1, (5, 3, 2, 1)),
    ByteSet(BY_NAME["avx2"], 1, (3, 2, 1)),
)


@dataclass(frozen=True)
class _Panels:
    """Where the panels of a tile are, ``i8*`` one by one; scales and zero points of the first group of the first."""

    words: list[Any]
    scale: Any
    zero: Any
    stride: Any  # from one group's scales to the next's
    ahead: Any  # what is read later
    ahead_step: Any  # bytes from one step to the next
    apart: Any  # and to the second line that is asked for in each


class _Bytes:
    """Vectors of bytes of one instruction set."""

    def __init__(self, emit: Emit, known: ByteSet, form: int) -> None:
        self.emit, self.known, self.form = emit, known, form
        self.kind = vector(I32, known.lanes)
        self.exact = known.isa.accumulates
        self.parts = ROWS // known.lanes  # vectors of a panel

    def weights(self, word: Any, plane: int, group: tuple[Any, Any] | None) -> Any:
        """The low (plane 0) or high nibbles of a vector as what is multiplied, one to a byte."""
        b = self.emit.b
        shifted = b.lshr(word, constant(4, word.type)) if plane else word
        word = b.and_(shifted, constant(0x0F0F0F0F, word.type))
        if group is None:
            return word
        scale, zero = group
        halves = vector(I16, 2 * self.known.lanes)
        scaled = b.bitcast(b.mul(b.bitcast(word, halves), b.bitcast(scale, halves)), vector(I8, 4 * self.known.lanes))
        return b.bitcast(b.add(scaled, b.bitcast(zero, scaled.type)), self.kind)

    def group(self, scales: Any, zeros: Any, offset: int) -> tuple[Any, Any]:
        """Scales in both halves of every lane, and what is added to its four bytes."""
        b = self.emit.b
        scale, zero = self.integers(scales, offset), self.integers(zeros, offset)
        zero = b.sub(constant(SHIFT if self.exact else 0, self.kind), zero)
        zero = b.mul(b.and_(zero, constant(255, self.kind)), constant(0x01010101, self.kind))
        return b.or_(scale, b.shl(scale, constant(16, self.kind))), zero

    def integers(self, base: Any, offset: int) -> Any:
        """Bytes at an address, one to a lane."""
        narrow = vector(I8, self.known.lanes)
        return self.emit.b.zext(self.emit.load(base, narrow, offset, align=1), self.kind)

    def signed(self, weight: Any) -> Any:
        """For processors that need the sign: int8 where BYTES holds unsigned."""
        b = self.emit.b
        if self.exact or self.form != BYTES:
            return weight
        return b.xor(weight, constant(-0x7F7F7F80, self.kind))

    def add_products(self, total: Any, weight: Any, x: Any) -> Any:
        """``total`` plus four products of bytes in each lane."""
        emit, b, lanes = self.emit, self.emit.b, self.known.lanes
        if self.exact:
            return emit.call(f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", self.kind, total, weight, x)
        octets, halves = vector(I8, 4 * lanes), vector(I16, 2 * lanes)
        weight, x = b.bitcast(weight, octets), b.bitcast(x, octets)
        if self.form in (BYTES, GROUPS):
            x = emit.call("llvm.x86.avx2.psign.b", octets, x, weight)
            weight = emit.call(f"llvm.abs.v{4 * lanes}i8", octets, weight, ir.Constant(ir.IntType(1), 0))
        pairs = emit.call("llvm.x86.avx2.pmadd.ub.sw", halves, weight, x)
        return b.add(total, emit.call("llvm.x86.avx2.pmadd.wd", self.kind, pairs, constant(1, halves)))


def _step(vectors: _Bytes, panels: _Panels, groups: list[Any], i: Any, x: Any, tokens: int, totals: list[Any]) -> Any:
    """Add the products of step ``i``: four columns of BYTES, eight of nibbles. ``x``: activations of a tile."""
    emit, lanes = vectors.emit, vectors.known.lanes
    b, parts, planes = emit.b, vectors.parts, 1 if vectors.form == BYTES else 2
    here = emit.at(x, emit.times(i, 4 * tokens * planes))
    ahead = b.mul(i, panels.ahead_step)
    emit.prefetch(panels.ahead, ahead, near=2)
    emit.prefetch(panels.ahead, b.add(ahead, panels.apart), near=2)
    totals = list(totals)
    words = []
    for words_at in panels.words:
        at = emit.at(words_at, emit.times(i, 4 * ROWS))
        words += [emit.load(at, vectors.kind, 4 * lanes * part) for part in range(parts)]
    for plane in range(planes):
        weights = []
        for word, group in zip(words, groups, strict=True):
            if planes == 2:
                word = vectors.weights(word, plane, group)
            weights.append(vectors.signed(word))
        for m in range(tokens):
            values = emit.widen(emit.load(here, I32, 4 * (plane * tokens + m)), lanes)
            for v, weight in enumerate(weights):
                totals[m * len(weights) + v] = vectors.add_products(totals[m * len(weights) + v], weight, values)
    return totals


def _multiply(vectors: _Bytes, panels: _Panels, x: Any, x_sums: Any, tokens: int, counts: tuple[Any, Any]) -> list[Any]:
    """All products of a tile: for each token, int32 vectors over the rows; ``counts`` of groups and steps in each."""
    emit, lanes = vectors.emit, vectors.known.lanes
    b, each = emit.b, len(panels.words) * vectors.parts
    groups, steps = counts
    none = [constant(0, vectors.kind)] * (tokens * each)

    def per_group(g: Any, totals: list[Any]) -> list[Any]:
        known: list[Any] = [None] * each
        scales, zeros = (emit.at(base, b.mul(g, panels.stride)) for base in (panels.scale, panels.zero))
        if vectors.form == GROUPS:
            known = [vectors.group(scales, zeros, lanes * v) for v in range(each)]
        first = b.mul(g, steps)
        sums = emit.loop(
            steps,
            none if vectors.form == GROUP_SUMS else totals,
            lambda i, sums: _step(vectors, panels, known, b.add(first, i), x, tokens, sums),
        )
        return scaled(g, scales, zeros, totals, sums) if vectors.form == GROUP_SUMS else sums

    def scaled(g: Any, scales: Any, zeros: Any, totals: list[Any], sums: list[Any]) -> list[Any]:
        results = []
        for m in range(tokens):
            at = emit.times(b.add(b.mul(groups, ir.Constant(I64, m)), g), 4)
            x_sum = emit.widen(emit.load(x_sums, I32, at), lanes)
            for v in range(each):
                product = b.mul(sums[m * each + v], vectors.integers(scales, lanes * v))
                zero = b.mul(x_sum, vectors.integers(zeros, lanes * v))
                results.append(b.add(totals[m * each + v], b.sub(product, zero)))
        return results

    return emit.loop(groups, none, per_group)


@intrinsic(prefer_literal=True)
def multiply_tile(typing_context: Any, known: Any, form: Any, tokens: Any, words: Any, panel_bytes: Any, scales: Any,
                  zeros: Any, stride: Any, groups: Any, steps: Any, x: Any, x_sums: Any,
                  ahead: Any, ahead_step: Any, apart: Any, out: Any) -> Any:  # fmt: skip
    """Write int32 ``(tokens, ROWS * panels)`` sums of products to ``out``.

    All but the literals are int64, most of them addresses.

    Args:
        known: index into ``BYTE_SETS``; form: one of the four. These two are literal.
        tokens: of this tile, one of ``ByteSet.tiles``.
        words: the first of ``ByteSet.panels`` panels; panel_bytes: from one to the next.
        scales, zeros: uint8, of the first row; stride: bytes from one group to the next. In groups only.
        groups, steps: how many, and steps in each; elsewhere one group has all steps.
        x: int8 activations ``(K / 4, tokens, 4)``.
        x_sums: int32 ``(tokens, groups)``, their sums over each group. GROUP_SUMS only.
        ahead, ahead_step, apart: what to ask memory for, two cache lines in every step: where it begins, how far it is
            to the next step's, and to the second line.
    """
    chosen = BYTE_SETS[known.literal_value]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tokens, words, panel_bytes, scales, zeros, stride, groups, steps, x, x_sums, *fetched, out = args[2:]
        emit = Emit(builder, chosen.isa)
        vectors = _Bytes(emit, chosen, form.literal_value)
        each = [emit.at(words, builder.mul(panel_bytes, ir.Constant(I64, p))) for p in range(chosen.panels)]
        scale, zero, x, x_sums, out = (emit.at(address, 0) for address in (scales, zeros, x, x_sums, out))
        panels = _Panels(each, scale, zero, stride, emit.at(fetched[0], 0), *fetched[1:])
        for size in chosen.tiles if vectors.form != GROUP_SUMS else SUMMED_TILES:
            with builder.if_then(builder.icmp_signed("==", tokens, ir.Constant(I64, size))):
                for i, total in enumerate(_multiply(vectors, panels, x, x_sums, size, (groups, steps))):
                    emit.store(total, out, 4 * chosen.lanes * i)
        return context.get_dummy_value()

    return types.void(known, form, *([types.int64] * 14)), generate


@intrinsic(prefer_literal=True)
def expand_panel(typing_context: Any, known: Any, words: Any, scales: Any, zeros: Any, stride: Any, groups: Any,
                 steps: Any, out: Any) -> Any:  # fmt: skip
    """Write a panel of GROUPS as one of BYTES to ``out``; arguments as for :func:`multiply_tile`."""
    chosen = BYTE_SETS[known.literal_value]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, scales, zeros, stride, groups, steps, out = args[1:]
        emit = Emit(builder, chosen.isa)
        vectors, b = _Bytes(emit, chosen, GROUPS), builder
        vectors.exact = True  # BYTES is unsigned everywhere
        base, lanes = [emit.at(address, 0) for address in (words, scales, zeros, out)], chosen.lanes

        def per_group(g: Any, _: list[Any]) -> list[Any]:
            at = [emit.at(each, b.mul(g, stride)) for each in base[1:3]]
            known = [vectors.group(at[0], at[1], lanes * part) for part in range(vectors.parts)]

            def per_step(i: Any, _: list[Any]) -> list[Any]:
                step = b.add(b.mul(g, steps), i)
                for part, group in enumerate(known):
                    word = emit.load(base[0], vectors.kind, emit.plus(emit.times(step, 4 * ROWS), 4 * lanes * part))
                    for plane in range(2):
                        weight = vectors.weights(word, plane, group)
                        offset = emit.plus(emit.times(step, 8 * ROWS), 4 * (ROWS * plane + lanes * part))
                        emit.store(weight, base[3], offset)
                return []

            emit.loop(steps, [], per_step)
            return []

        emit.loop(groups, [], per_group)
        return context.get_dummy_value()

    return types.void(known, *([types.int64] * 7)), generate
