"""The CPU kernel of ``w4a16_linear``: 16-bit integer dot products on packed nibbles, compiled by numba, no C compiler.

Activations become 16-bit block floating point: every block of at most 256 values along K, never larger than a weight
group, is scaled so that its largest magnitude is 32767. Every value is then off by at most half a step. The product
becomes ``sum(q * xq)``, exact in 32-bit integers: a word of eight weights gives, shifted and masked, two 16-bit lanes
that one multiply-add instruction (``vpmaddwd`` on x86) consumes, sixteen products at a time with AVX2.

    y[m, n] = sum_b  xs[m, b] * scale[n, b] * (sum_k q[n, k] * xq[m, k]  -  zero[n, b] * sum_k xq[m, k])

A block whose largest value dwarfs the others is reported as uneven; the caller then multiplies what rounding left over
in a second pass, which makes such tokens more exact than the rest.

A chunk is 64 neighbours along K, 32 bytes of a weight row. Seen as sixteen 16-bit lanes, lane ``2 t + h`` holds
elements ``8 t + 2 p + h`` in its four nibbles ``p`` (:mod:`kernelgraft_core.quant.int4`), so the activations of a chunk
are stored as four planes ``p`` of sixteen lanes in that order.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernelgraft_core.runtime.native import cpu_kernel, pointer

CHUNK = 64  # weights in one 256-bit vector
LANES = 16
TILE = 4  # rows of the weight, or of the activations, that one microkernel handles together
LARGEST = 32767  # what a block's largest magnitude becomes
EVEN = 64  # a block is uneven when its largest magnitude is more than this many times the mean of the others
PANEL = 32  # weight rows whose scales are unpacked together; their nibbles stay in the second-level cache

_I16, _I32, _I64, _F16, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
_BYTES = ir.IntType(8).as_pointer()
_V16I16, _V8I32, _V8F32, _V4F32 = (ir.VectorType(t, n) for t, n in ((_I16, 16), (_I32, 8), (_F32, 8), (_F32, 4)))


def _has_avx2() -> bool:
    import torch

    # torch's own check honours ATEN_CPU_CAPABILITY and the operating system's support for the registers.
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


_MULTIPLY_ADD_INSTRUCTION = _has_avx2()


class _Emit:
    """A few vector operations on top of llvmlite's builder."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def at(self, base: Any, offset: Any) -> Any:
        """An address in bytes: ``base`` is ``i8*`` or int64, ``offset`` an int64 value or a Python int."""
        if base.type == _I64:
            base = self.b.inttoptr(base, _BYTES)
        offset = ir.Constant(_I64, offset) if isinstance(offset, int) else offset
        return self.b.gep(base, [offset])

    def load(self, base: Any, kind: Any, offset: Any = 0, align: int = 4) -> Any:
        value = self.b.load(self.b.bitcast(self.at(base, offset), kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Any, base: Any, offset: Any = 0) -> None:
        self.b.store(value, self.b.bitcast(self.at(base, offset), value.type.as_pointer())).align = 4

    def prefetch(self, base: Any, offset: Any) -> None:
        """Ask for a cache line that is read once; an address beyond the array does no harm."""
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0i8")
        self.b.call(function, [self.at(base, offset), *(ir.Constant(_I32, hint) for hint in (0, 3, 1))])

    def times(self, index: Any, factor: int) -> Any:
        return self.b.mul(index, ir.Constant(_I64, factor))

    def shuffle(self, a: Any, b: Any, order: list[int]) -> Any:
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), order))

    def splat(self, scalar: Any, count: int) -> Any:
        kind = ir.VectorType(scalar.type, count)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
        return self.shuffle(first, first, [0] * count)

    def twice(self, quad: Any) -> Any:
        return self.shuffle(quad, quad, [0, 1, 2, 3] * 2)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        kind = ir.FunctionType(a.type, [a.type] * 3)
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.fma.v{a.type.count}f32")
        return self.b.call(function, [a, b, c])

    def nibbles(self, words: Any, plane: int) -> Any:
        """One of the four nibbles of every lane."""
        if plane:
            words = self.b.lshr(words, ir.Constant(_V16I16, [4 * plane] * LANES))
        return words if plane == 3 else self.b.and_(words, ir.Constant(_V16I16, [15] * LANES))

    def multiply_add(self, a: Any, b: Any) -> Any:
        """Products of sixteen int16, neighbours added: eight int32."""
        if _MULTIPLY_ADD_INSTRUCTION:
            kind = ir.FunctionType(_V8I32, [_V16I16, _V16I16])
            return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx2.pmadd.wd"), [a, b])
        wide = ir.VectorType(_I32, LANES)
        product = self.b.mul(self.b.sext(a, wide), self.b.sext(b, wide))
        even, odd = list(range(0, LANES, 2)), list(range(1, LANES, 2))
        return self.b.add(self.shuffle(product, product, even), self.shuffle(product, product, odd))

    def fold_four(self, vectors: list[Any]) -> Any:
        """Lanes ``i`` and ``4 + i`` of the result: the sums of the lower and of the upper half of vector ``i``."""
        even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
        pairs = [self.b.add(self.shuffle(a, b, even), self.shuffle(a, b, odd)) for a, b in (vectors[:2], vectors[2:])]
        return self.b.add(self.shuffle(pairs[0], pairs[1], even), self.shuffle(pairs[0], pairs[1], odd))

    def add_halves(self, vector: Any) -> Any:
        low, high = self.shuffle(vector, vector, [0, 1, 2, 3]), self.shuffle(vector, vector, [4, 5, 6, 7])
        return self.b.fadd(low, high)

    def loop(self, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """``for i in range(count): carried = body(i, carried)`` with vectors kept in registers; at least once."""
        b = self.b
        before, inside = b.block, b.append_basic_block("loop")
        b.branch(inside)
        b.position_at_end(inside)
        i = b.phi(_I64)
        i.add_incoming(ir.Constant(_I64, 0), before)
        state = [b.phi(v.type) for v in carried]
        for phi, start in zip(state, carried, strict=True):
            phi.add_incoming(start, before)
        following = body(i, state)
        after = b.add(i, ir.Constant(_I64, 1))
        i.add_incoming(after, b.block)
        for phi, value in zip(state, following, strict=True):
            phi.add_incoming(value, b.block)
        done = b.append_basic_block("done")
        b.cbranch(b.icmp_signed("<", after, count), inside, done)
        b.position_at_end(done)
        return following


def _tile(emit: _Emit, args: Any, rows: int, tokens: int, chunks: int, halves: int) -> None:
    """``rows`` weight rows times ``tokens`` tokens over all blocks, stored to ``out``.

    One of the two numbers is TILE: that axis ends up in the lanes of a vector. ``args``: weight address, bytes of a
    weight row, activations, ``scale`` (``(blocks, 8)``: scales of four rows, then scale times zero point), ``x_scale``
    (``(blocks, 8)``: scales of four tokens, then their sums), output address, bytes of an output row, steps.
    """
    b = emit.b
    weight, row_bytes, x, scale, x_scale, out, out_bytes, steps = args
    weights = [emit.at(weight, emit.times(row_bytes, r)) for r in range(rows)]
    x, scale, x_scale, out = (emit.at(address, 0) for address in (x, scale, x_scale, out))
    by_token = tokens == TILE
    others = rows if by_token else tokens
    lane_side, scalar_side = (x_scale, scale) if by_token else (scale, x_scale)
    chunk_bytes = 2 * CHUNK * tokens

    def block(i: Any, state: list[Any]) -> list[Any]:
        totals: list[list[Any]] = [[None] * TILE for _ in range(others)]
        for c in range(chunks):
            chunk = b.add(emit.times(i, chunks), ir.Constant(_I64, c))
            at_w, here = emit.times(chunk, CHUNK // 2), emit.at(x, emit.times(chunk, chunk_bytes))
            words = [emit.load(w, _V16I16, at_w) for w in weights]
            if not by_token and c % 2 == 0:
                # The next four rows: each row is too short for the hardware to notice a stream before it ends. One
                # chunk is half a cache line.
                for w in weights:
                    emit.prefetch(w, b.add(at_w, emit.times(row_bytes, rows)))
            for plane in range(4):
                nibbles = [emit.nibbles(w, plane) for w in words]
                for m in range(tokens):
                    values = emit.load(here, _V16I16, 2 * CHUNK * m + 2 * LANES * plane, align=2)
                    for r in range(rows):
                        part = emit.multiply_add(nibbles[r], values)
                        which, lane = (r, m) if by_token else (m, r)
                        total = totals[which][lane]
                        totals[which][lane] = part if total is None else b.add(total, part)
        at = emit.times(i, 32 * halves)
        lane_side_here, scalar_side_here = emit.at(lane_side, at), emit.at(scalar_side, at)
        quads = [emit.load(lane_side_here, _V4F32, 32 * h) for h in range(halves)]
        factors = emit.twice(quads[0]) if halves == 1 else emit.shuffle(quads[0], quads[1], list(range(8)))
        sums, offsets = [], []
        for o in range(others):
            scalars = [emit.load(scalar_side_here, _F32, 32 * h + 4 * o) for h in range(halves)]
            spread = emit.splat(scalars[0], 8)
            if halves == 2:
                spread = emit.shuffle(spread, emit.splat(scalars[1], 8), [0, 1, 2, 3, 12, 13, 14, 15])
            total = b.sitofp(emit.fold_four(totals[o]), _V8F32)
            sums.append(emit.fma(total, b.fmul(factors, spread), state[o]))
            offset = state[others + o]
            for h in range(halves):
                shifted = emit.load(lane_side_here, _V4F32, 32 * h + 16)
                other = emit.splat(emit.load(scalar_side_here, _F32, 32 * h + 16 + 4 * o), 4)
                offset = emit.fma(shifted, other, offset)
            offsets.append(offset)
        return [*sums, *offsets]

    zero8, zero4 = ir.Constant(_V8F32, [0.0] * 8), ir.Constant(_V4F32, [0.0] * 4)
    state = emit.loop(steps, [zero8] * others + [zero4] * others, block)
    for o in range(others):
        result = b.fsub(emit.add_halves(state[o]), state[others + o])
        if not by_token:
            emit.store(result, out, emit.times(out_bytes, o))
            continue
        for m in range(TILE):
            element = b.extract_element(result, ir.Constant(_I32, m))
            emit.store(element, emit.at(out, emit.times(out_bytes, m)), 4 * o)


def _microkernel(rows: int, tokens: int) -> Any:
    @intrinsic(prefer_literal=True)
    def run(typing_context: Any, weight: Any, row_bytes: Any, x: Any, scale: Any, x_scale: Any, out: Any,
            out_bytes: Any, steps: Any, chunks: Any, halves: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _tile(_Emit(builder), args[:8], rows, tokens, chunks.literal_value, halves.literal_value)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 8), chunks, halves), generate

    return run


_one_token = _microkernel(TILE, 1)
_four_tokens = _microkernel(2, TILE)


@intrinsic
def _load_half(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(_Emit(builder).load(args[0], _F16, align=2), _F32)

    return types.float32(types.int64), generate


# What both kernels are told: one int64 array, in this order.
# The last is set to 1 by quantize_tokens when a block was uneven.
TOKENS, ROWS, K, GROUPS, BLOCKS, X, XQ, X_SCALE, QWEIGHT, SCALES, ZEROS, OUT, UNEVEN = range(13)


@cpu_kernel(fastmath={"contract"})
def quantize_tokens(start: int, stop: int, args: Any) -> None:
    """Rows ``start`` to ``stop`` of float32 ``x (M, K)`` to block floating point.

    ``XQ`` is int16 ``(M / 4, K / 64, 4, 64)`` for whole tiles of four tokens and ``(K / 64, 64)`` for each token after
    them. ``X_SCALE`` is float32 ``(ceil(M / 4), BLOCKS, 2, 4)``: the scales of four tokens' blocks, then each scale
    times the sum of the block's integers. A block that holds a NaN or an infinity gets the scale NaN.
    """
    tokens, k, blocks = args[TOKENS], args[K], args[BLOCKS]
    block, whole = k // blocks, tokens // TILE * TILE
    x = numba.carray(pointer(args[X]), (tokens, k), np.float32)
    bits = numba.carray(pointer(args[X]), (tokens, k), np.int32)
    xq = numba.carray(pointer(args[XQ]), (tokens * k // 2,), np.int32)
    x_scale = numba.carray(pointer(args[X_SCALE]), ((tokens + 3) // 4, blocks, 2, 4), np.float32)
    rounded = np.empty(block, np.int16)
    pairs = rounded.view(np.int32)
    as_bits = np.empty(1, np.int32)
    as_float = as_bits.view(np.float32)
    for m in range(start, stop):
        stride = CHUNK * TILE if m < whole else CHUNK
        base = m // TILE * TILE * k + m % TILE * CHUNK if m < whole else m * k
        for i in range(blocks):
            # Magnitudes compare like the integers of their bits, and whatever is not finite is larger than all others.
            largest_bits = np.int32(0)
            for j in range(i * block, (i + 1) * block):
                largest_bits = max(largest_bits, bits[m, j] & np.int32(0x7FFFFFFF))
            as_bits[0] = largest_bits
            largest = as_float[0]
            total: Any = np.int32(0)
            sizes: Any = np.int32(0)
            scale = np.float32(0)
            if largest_bits >= np.int32(0x7F800000):
                scale = np.float32(np.nan)
                rounded[:] = 0
            elif largest <= np.float32(1e-30):
                rounded[:] = 0
            else:
                scale = largest / np.float32(LARGEST)
                inverse = np.float32(LARGEST) / largest
                for j in range(block):
                    value = np.int32(np.rint(x[m, i * block + j] * inverse))
                    rounded[j] = np.int16(value)
                    total += value
                    sizes += abs(value)
                if (sizes - LARGEST) * EVEN < LARGEST * (block - 1):
                    args[UNEVEN] = 1
            for t in range(block // 8):
                step = i * block // 8 + t
                at = (base + step // 8 * stride) // 2 + step % 8
                for p in range(4):
                    xq[at + p * (LANES // 2)] = pairs[4 * t + p]
            x_scale[m // 4, i, 0, m % 4] = scale
            x_scale[m // 4, i, 1, m % 4] = scale * np.float32(total)


def rows_kernel(chunks: int, halves: int) -> Any:
    """The kernel for blocks of ``chunks`` chunks, or for ``halves`` blocks in one chunk."""

    @cpu_kernel(fastmath={"contract", "reassoc"})
    def multiply_rows(start: int, stop: int, args: Any) -> None:
        """Weight rows ``4 * start`` to ``4 * stop`` against all tokens into ``OUT`` float32 ``(M, N)``.

        The last four rows overlap the four before when N is not a multiple of 4: N must be at least 4.
        """
        tokens, rows, k, groups, blocks = args[TOKENS], args[ROWS], args[K], args[GROUPS], args[BLOCKS]
        scales, zeros, out = args[SCALES], numba.carray(pointer(args[ZEROS]), (rows, groups), np.uint8), args[OUT]
        per_group, steps, row_bytes = blocks // groups, blocks // halves, k // 2
        scale = np.empty((PANEL // TILE, blocks, 2, TILE), np.float32)
        tile_of_scales = blocks * 2 * TILE * 4
        whole = tokens // TILE * TILE
        for panel in range(start, stop, PANEL // TILE):
            quads = min(PANEL // TILE, stop - panel)
            for quad in range(quads):
                first = min((panel + quad) * TILE, rows - TILE)
                for r in range(TILE):
                    at = scales + (first + r) * groups * 2
                    for g in range(groups):
                        value = _load_half(at + 2 * g)
                        shift = value * np.float32(zeros[first + r, g])
                        for j in range(g * per_group, (g + 1) * per_group):
                            scale[quad, j, 0, r] = value
                            scale[quad, j, 1, r] = shift
            for m in range(0, whole, TILE):
                x, x_scale = args[XQ] + m * k * 2, args[X_SCALE] + m // TILE * tile_of_scales
                for quad in range(quads):
                    first = min((panel + quad) * TILE, rows - TILE)
                    for r in range(0, TILE, 2):
                        _four_tokens(
                            args[QWEIGHT] + (first + r) * row_bytes, row_bytes, x, scale[quad, 0, 0, r:].ctypes.data,
                            x_scale, out + (m * rows + first + r) * 4, rows * 4, steps, chunks, halves,
                        )  # fmt: skip
            for m in range(whole, tokens):
                x, x_scale = args[XQ] + m * k * 2, args[X_SCALE] + m // TILE * tile_of_scales + m % TILE * 4
                for quad in range(quads):
                    first = min((panel + quad) * TILE, rows - TILE)
                    _one_token(
                        args[QWEIGHT] + first * row_bytes, row_bytes, x, scale[quad].ctypes.data, x_scale,
                        out + (m * rows + first) * 4, rows * 4, steps, chunks, halves,
                    )  # fmt: skip

    return multiply_rows


@cpu_kernel(fastmath={"contract"})
def dequantize_rows(start: int, stop: int, args: Any) -> None:
    """Rows ``start`` to ``stop`` of the weight to float32 ``OUT (N, K)``."""
    k, groups = args[K], args[GROUPS]
    words = numba.carray(pointer(args[QWEIGHT]), (args[ROWS], k // 8), np.uint32)
    zeros = numba.carray(pointer(args[ZEROS]), (args[ROWS], groups), np.uint8)
    out = numba.carray(pointer(args[OUT]), (args[ROWS], k), np.float32)
    per_group = k // groups // 8
    for n in range(start, stop):
        for g in range(groups):
            scale = _load_half(args[SCALES] + (n * groups + g) * 2)
            zero = np.int32(zeros[n, g])
            for t in range(g * per_group, (g + 1) * per_group):
                word = words[n, t]
                for p in range(4):
                    for h in range(2):
                        q = np.int32((word >> np.uint32(4 * p + 16 * h)) & np.uint32(15))
                        out[n, 8 * t + 2 * p + h] = np.float32(q - zero) * scale
