"""The steps of attention over 4-bit rows on a CPU, in LLVM instructions: scores, softmax, and sums of values.

A tile of at most TILE tokens is gone through in three steps. Query and softmax weights become 16-bit integers, each row
of them scaled so that its largest magnitude is 32767; products with the cache's nibbles are then exact in 32-bit
integers, and the cache's own scales enter once per token:

    score[n]  = key_scale[n] * (q . key_nibbles[n]) + key_low[n] * sum(q)
    out       = sum_n (weight[n] * value_scale[n]) * value_nibbles[n]  +  sum_n weight[n] * value_low[n]

What rounding drops of queries and weights meets nibbles of 7.5 on average: so much is added to the products.

A word of 16 bits holds four nibbles: plane ``p`` of a vector is its words shifted by ``4 p``, and lane ``t`` of it the
channel ``4 t + p``.
"""

from __future__ import annotations

from typing import Any

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
    constant,
    vector,
)

from .rows import SCALE_BYTES

TILE = 128  # tokens; their rows stay in the first-level cache between keys and values
RUN = 16  # floats of a softmax that are computed together; LLVM splits them where vectors are shorter
PACK = 8  # values that are quantized together
LINE = 64  # bytes of a cache line
LARGEST = 32767.0
MEAN_NIBBLE = 7.5
LOWEST = -1e30  # what a running maximum starts at
_FLOATS, _INTEGERS = vector(F32, RUN), vector(I32, RUN)
_ANY = INSTRUCTION_SETS[-1]
# 2^f for |f| <= 1/2 by Taylor's series, ln(2)^k / k!, off by 1.2e-7.
_POWERS = (1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477,
           0.0013333558146428443, 0.00015403530393381609)  # fmt: skip


def split_words(head_size: int, lanes: int) -> list[int]:
    """Words of each vector of ``lanes`` that a key or value fills."""
    words = head_size // 4
    return [min(lanes, words - first) for first in range(0, words, lanes)]


def _load_words(emit: Emit, address: Any, offset: int, words: int, lanes: int) -> Any:
    """``words`` int16, an even number, at an address of any alignment; zeros in the other lanes."""
    if words == lanes:
        return emit.load(address, vector(I16, lanes), offset, align=1)
    kind = vector(I32, lanes // 2)
    mask = ir.Constant(vector(ir.IntType(1), lanes // 2), [lane < words // 2 for lane in range(lanes // 2)])
    source = emit.b.bitcast(emit.at(address, offset), kind.as_pointer())
    name = f"llvm.masked.load.v{lanes // 2}i32.p0v{lanes // 2}i32"
    loaded = emit.call(name, kind, source, ir.Constant(I32, 1), mask, constant(0, kind))
    return emit.b.bitcast(loaded, vector(I16, lanes))


@intrinsic(prefer_literal=True)
def multiply_keys(typing_context: Any, isa: Any, head_size: Any, rows: Any, addresses: Any, ahead: Any, fours: Any,
                  query: Any, out: Any) -> Any:  # fmt: skip
    """Products of ``rows`` queries with ``4 * fours`` keys to float32 ``out`` ``(rows, TILE)``.

    Args:
        isa: index into ``INSTRUCTION_SETS``; it, ``head_size`` and ``rows`` are literal.
        addresses: where the cache's rows are, int64 ``(4 * fours,)``.
        ahead: where rows are that are needed soon: pages are too small for the processor to foresee the next one.
        query: int16 ``(rows, vectors, 4 planes, lanes)``, zeros beyond the head size.
    """
    instructions, d, count = INSTRUCTION_SETS[isa.literal_value], head_size.literal_value, rows.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        addresses, ahead, fours, query, out = args[3:]
        emit, lanes = Emit(builder, instructions), instructions.lanes
        vectors = split_words(d, lanes)
        sums = vector(F32, lanes // 2)

        def token(address: Any) -> list[Any]:
            products: list[Any] = [None] * count
            for v, words in enumerate(vectors):
                nibbles = _load_words(emit, address, 2 * lanes * v, words, lanes)
                for plane in range(4):
                    keys = emit.mask(emit.shift_right(nibbles, 4 * plane), 15)
                    for r in range(count):
                        at = 2 * lanes * (4 * (len(vectors) * r + v) + plane)
                        queries = emit.load(query, vector(I16, lanes), at)
                        products[r] = emit.multiply_add(keys, queries, products[r])
            return [builder.sitofp(product, sums) for product in products]

        def work(i: Any, _: list[Any]) -> list[Any]:
            four = [token(emit.load(addresses, I64, emit.plus(emit.times(i, 32), 8 * t))) for t in range(4)]
            for t in range(4):
                soon = emit.load(ahead, I64, emit.plus(emit.times(i, 32), 8 * t))
                for line in range(0, d + SCALE_BYTES, LINE):
                    emit.prefetch(soon, line)
            for r in range(count):
                total = emit.sums_of_four([products[r] for products in four])
                emit.store(total, out, emit.plus(emit.times(i, 16), 4 * TILE * r))
            return []

        emit.loop(fours, [], work)
        return context.get_dummy_value()

    return types.void(isa, head_size, rows, *([types.int64] * 5)), generate


@intrinsic(prefer_literal=True)
def add_values(typing_context: Any, isa: Any, head_size: Any, rows: Any, addresses: Any, pairs: Any, weights: Any,
               factors: Any, sums: Any) -> Any:  # fmt: skip
    """``sums = sums * decay + scale * (weights @ value nibbles)`` for ``2 * pairs`` tokens.

    Args:
        isa, head_size, rows, addresses: as for :func:`multiply_keys`.
        weights: int16 ``(rows, TILE)``.
        factors: decay and scale, float32 ``(rows, 2)``.
        sums: float32 ``(rows, vectors of half the lanes, 4 planes, half the lanes)``.
    """
    instructions, d, count = INSTRUCTION_SETS[isa.literal_value], head_size.literal_value, rows.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        addresses, pairs, weights, factors, sums = args[3:]
        emit, lanes = Emit(builder, instructions), instructions.lanes
        width = lanes // 2
        words_of = split_words(d, width)
        wide, floats, halves = vector(I32, width), vector(F32, width), vector(I16, lanes)
        for v, words in enumerate(words_of):

            def pair(i: Any, totals: list[Any], v: int = v, words: int = words) -> list[Any]:
                two = []
                for t in range(2):
                    address = emit.load(addresses, I64, emit.plus(emit.times(i, 16), 8 * t))
                    two.append(builder.zext(_load_words(emit, address, d // 2 + 2 * width * v, words, width), wide))
                # A token's words in the low halves of the lanes, the next one's in the high halves.
                both = builder.or_(two[0], builder.shl(two[1], constant(16, wide)))
                planes = [builder.bitcast(emit.mask(emit.shift_right(both, 4 * p), 0x000F000F), halves)
                          for p in range(4)]  # fmt: skip
                following = []
                for r in range(count):
                    weight = emit.load(weights, I32, emit.plus(emit.times(i, 4), 2 * TILE * r))
                    weight = builder.bitcast(emit.widen(weight, width), halves)
                    following += [emit.multiply_add(planes[p], weight, totals[4 * r + p]) for p in range(4)]
                return following

            totals = emit.loop(pairs, [constant(0, wide)] * (4 * count), pair)
            for r in range(count):
                decay, scale = (emit.widen(emit.load(factors, F32, 4 * (2 * r + i)), width) for i in range(2))
                for p in range(4):
                    at = 4 * width * (4 * (len(words_of) * r + v) + p)
                    old = builder.fmul(emit.load(sums, floats, at), decay)
                    emit.store(emit.fma(builder.sitofp(totals[4 * r + p], floats), scale, old), sums, at)
        return context.get_dummy_value()

    return types.void(isa, head_size, rows, *([types.int64] * 5)), generate


@intrinsic
def unpack_scales(typing_context: Any, addresses: Any, offset: Any, fours: Any, out: Any) -> Any:
    """The four float16 ``offset`` bytes behind each of ``4 * fours`` addresses to float32 ``out`` ``(4, TILE)``.

    Where the third, the scale of a value, is no number, neither is then the fourth.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, four = Emit(builder, _ANY), vector(F32, 4)

        def work(i: Any, _: list[Any]) -> list[Any]:
            rows = []
            for t in range(4):
                address = emit.load(args[0], I64, emit.plus(emit.times(i, 32), 8 * t))
                rows.append(builder.fpext(emit.load(address, vector(F16, 4), args[1], align=1), four))
            a, b, c, d = rows
            low, high = [0, 4, 1, 5], [2, 6, 3, 7]
            pairs = [(emit.shuffle(a, b, order), emit.shuffle(c, d, order)) for order in (low, high)]
            columns = [emit.shuffle(*pair, order) for pair in pairs for order in ([0, 1, 4, 5], [2, 3, 6, 7])]
            columns[3] = emit.fma(columns[2], constant(0.0, four), columns[3])
            for which, column in enumerate(columns):
                emit.store(column, args[3], emit.plus(emit.times(i, 16), 4 * TILE * which))
            return []

        emit.loop(args[2], [], work)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 4)), generate


def _power_of_two(emit: Emit, x: Any) -> Any:
    """``2 ** x``, 0 below -126, for x at most 126."""
    b = emit.b
    small = b.fcmp_ordered("<", x, constant(-126.0, _FLOATS))
    x = b.select(small, constant(-126.0, _FLOATS), x)
    whole = emit.call(f"llvm.rint.v{RUN}f32", _FLOATS, x)
    fraction, total = b.fsub(x, whole), constant(_POWERS[-1], _FLOATS)
    for power in _POWERS[-2::-1]:
        total = emit.fma(total, fraction, constant(power, _FLOATS))
    exponent = b.shl(b.add(b.fptosi(whole, _INTEGERS), constant(127, _INTEGERS)), constant(23, _INTEGERS))
    return b.select(small, constant(0.0, _FLOATS), b.fmul(total, b.bitcast(exponent, _FLOATS)))


def _capped(emit: Emit, x: Any, cap: Any) -> Any:
    """``cap * tanh(y)`` where x is ``2 y / ln(2)``."""
    b = emit.b
    x = b.select(b.fcmp_ordered(">", x, constant(126.0, _FLOATS)), constant(126.0, _FLOATS), x)
    one, two = constant(1.0, _FLOATS), constant(-2.0, _FLOATS)
    return b.fmul(cap, b.fadd(one, b.fdiv(two, b.fadd(_power_of_two(emit, x), one))))


def _larger(emit: Emit, a: Any, b: Any) -> Any:
    """Of ``a``, and of ``b`` where it is a number."""
    return emit.b.select(emit.b.fcmp_ordered(">", b, a), b, a)


def _across(emit: Emit, quantity: Any, largest: bool) -> Any:
    """The largest lane, or the sum of all, as a scalar."""
    while (count := quantity.type.count) > 1:
        low = emit.shuffle(quantity, quantity, list(range(count // 2)))
        high = emit.shuffle(quantity, quantity, list(range(count // 2, count)))
        quantity = _larger(emit, low, high) if largest else emit.b.fadd(low, high)
    return emit.b.extract_element(quantity, ir.Constant(I32, 0))


@intrinsic(prefer_literal=True)
def weigh_tokens(typing_context: Any, is_capped: Any, products: Any, scales: Any, runs: Any, first: Any, last: Any,
                 scale: Any, rest: Any, total: Any, cap: Any, largest: Any, weights: Any) -> Any:  # fmt: skip
    """The softmax of one query over a tile: from products with keys to weights of value nibbles.

    Args:
        is_capped: literal, 0 or 1.
        products: float32 ``(RUN * runs,)`` of :func:`multiply_keys`; holds ``weight * value_scale`` afterwards.
        scales: of :func:`unpack_scales`.
        first, last: the tokens that the query sees.
        scale, rest, total: what products are multiplied with for scores to base 2, what is added to them, and what the
            lower ends of keys are multiplied with.
        cap: of such scores.
        largest: score so far.
        weights: int16 ``(RUN * runs,)``.

    Returns:
        The largest score, the sum of the weights ``2 ** (score - largest)``, what is added to every channel (the sum of
        those times the lower ends of values), and what the integers have to be multiplied with. The sums are NaN where
        a seen row is.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        products, scales, runs, first, last, scale, rest, total, cap, largest, weights = args[1:]
        emit = Emit(builder, _ANY)
        numbers = ir.Constant(_INTEGERS, list(range(RUN)))
        first, last = (emit.widen(builder.trunc(each, I32), RUN) for each in (first, last))
        scale, rest, total, cap = (emit.widen(each, RUN) for each in (scale, rest, total, cap))
        nothing = constant(0.0, _FLOATS)

        def is_seen(i: Any) -> Any:
            token = builder.add(numbers, emit.widen(builder.trunc(emit.times(i, RUN), I32), RUN))
            return builder.and_(builder.icmp_signed(">=", token, first), builder.icmp_signed("<", token, last))

        def column(which: int, at: Any) -> Any:
            return emit.load(scales, _FLOATS, emit.plus(at, 4 * TILE * which))

        def score(i: Any, best: list[Any]) -> list[Any]:
            at = emit.times(i, 4 * RUN)
            product = emit.fma(emit.load(products, _FLOATS, at), scale, rest)
            found = emit.fma(product, column(0, at), builder.fmul(column(1, at), total))
            if signature.args[0].literal_value:
                found = _capped(emit, found, cap)
            found = builder.select(is_seen(i), found, constant(float("-inf"), _FLOATS))
            emit.store(found, products, at)
            return [_larger(emit, best[0], found)]

        (best,) = emit.loop(runs, [emit.widen(largest, RUN)], score)
        best = _across(emit, best, largest=True)
        spread = emit.widen(best, RUN)

        def weigh(i: Any, sums: list[Any]) -> list[Any]:
            at, seen = emit.times(i, 4 * RUN), is_seen(i)
            weight = _power_of_two(emit, builder.fsub(emit.load(products, _FLOATS, at), spread))
            # What is not seen has no weight, and 0 times NaN must not count.
            scaled = builder.select(seen, builder.fmul(weight, column(2, at)), nothing)
            lower = builder.select(seen, builder.fmul(weight, column(3, at)), nothing)
            emit.store(scaled, products, at)
            return [builder.fadd(sums[0], weight), builder.fadd(sums[1], lower), _larger(emit, sums[2], scaled)]

        weight, lower, top = emit.loop(runs, [nothing] * 3, weigh)
        weight, lower = (_across(emit, each, largest=False) for each in (weight, lower))
        top = _across(emit, top, largest=True)
        is_large = builder.fcmp_ordered(">", top, ir.Constant(F32, 1e-30))
        top = builder.select(is_large, top, ir.Constant(F32, 1e-30))
        inverse = emit.widen(builder.fdiv(ir.Constant(F32, LARGEST), top), RUN)

        def round_weights(i: Any, dropped: list[Any]) -> list[Any]:
            scaled = builder.fmul(emit.load(products, _FLOATS, emit.times(i, 4 * RUN)), inverse)
            nearest = emit.call(f"llvm.rint.v{RUN}f32", _FLOATS, scaled)
            integers = builder.trunc(builder.fptosi(nearest, _INTEGERS), vector(I16, RUN))
            emit.store(integers, weights, emit.times(i, 2 * RUN))
            return [builder.fadd(dropped[0], builder.fsub(scaled, nearest))]

        (dropped,) = emit.loop(runs, [nothing], round_weights)
        factor = builder.fdiv(top, ir.Constant(F32, LARGEST))
        dropped = builder.fmul(_across(emit, dropped, largest=False), ir.Constant(F32, MEAN_NIBBLE))
        lower = builder.fadd(lower, builder.fmul(dropped, factor))
        return context.make_tuple(builder, signature.return_type, [best, weight, lower, factor])

    words, floats = [types.int64] * 5, [types.float32] * 5
    return types.UniTuple(types.float32, 4)(is_capped, *words, *floats, types.int64), generate


@intrinsic
def find_range(typing_context: Any, source: Any, count: Any) -> Any:
    """Smallest and largest of ``count`` float32, a multiple of PACK, and a number that is NaN if one is not finite."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, kind = Emit(builder, _ANY), vector(F32, PACK)

        def look(i: Any, state: list[Any]) -> list[Any]:
            values = emit.load(args[0], kind, emit.times(i, 4 * PACK))
            negative = _larger(emit, state[0], builder.fneg(values))
            return [negative, _larger(emit, state[1], values), builder.fadd(state[2], builder.fsub(values, values))]

        start = [constant(float("-inf"), kind)] * 2 + [constant(0.0, kind)]
        found = emit.loop(builder.udiv(args[1], ir.Constant(I64, PACK)), start, look)
        negative, largest = (_across(emit, each, largest=True) for each in found[:2])
        results = [builder.fneg(negative), largest, _across(emit, found[2], largest=False)]
        return context.make_tuple(builder, signature.return_type, results)

    return types.UniTuple(types.float32, 3)(types.int64, types.int64), generate


@intrinsic
def pack_values(typing_context: Any, source: Any, target: Any, count: Any, low: Any, step: Any) -> Any:
    """``count`` finite float32, a multiple of PACK, to nibbles ``round((x - low) / step)`` in 0..15."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, kind = Emit(builder, _ANY), vector(F32, PACK)
        low, step = (emit.widen(each, PACK) for each in args[3:])

        def work(i: Any, _: list[Any]) -> list[Any]:
            values = emit.load(args[0], kind, emit.times(i, 4 * PACK))
            values = emit.call(f"llvm.rint.v{PACK}f32", kind, builder.fdiv(builder.fsub(values, low), step))
            values = _larger(emit, constant(0.0, kind), values)
            values = builder.select(
                builder.fcmp_ordered(">", values, constant(15.0, kind)), constant(15.0, kind), values
            )
            nibbles = builder.trunc(builder.fptosi(values, vector(I32, PACK)), vector(ir.IntType(8), PACK))
            even, odd = (emit.shuffle(nibbles, nibbles, list(range(start, PACK, 2))) for start in range(2))
            packed = builder.or_(even, builder.shl(odd, constant(4, odd.type)))
            emit.store(packed, args[1], emit.times(i, PACK // 2), align=1)
            return []

        emit.loop(builder.udiv(args[2], ir.Constant(I64, PACK)), [], work)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.float32), generate
