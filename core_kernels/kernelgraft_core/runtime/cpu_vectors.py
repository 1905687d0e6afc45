"""Vector instructions for CPU kernels that numba compiles: LLVM's builder, and what differs between processors.

A kernel is written once for vectors of 16 or 32 lanes of int16. The one instruction that matters, products of int16
added in pairs to int32, is emitted by name where the processor has it and spelled out elsewhere (Arm).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils

from kernelgraft_core.runtime.native import target_features

I16, I32, I64, F16, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
_BYTES = ir.IntType(8).as_pointer()


@dataclass(frozen=True)
class InstructionSet:
    """What the kernels ask of a processor.

    Attributes:
        lanes: of int16 in a vector.
        multiplies: whether ``vpmaddwd`` is there for such vectors: int16 products, neighbours added to int32.
        accumulates: whether ``vpdpwssd`` is, which adds them to what was there.
        needs: features of LLVM's target that these instructions need.
        capability: how the names begin that torch gives processors on which it uses as much.
    """

    name: str
    lanes: int
    multiplies: bool = False
    accumulates: bool = False
    needs: tuple[str, ...] = ()
    capability: tuple[str, ...] = ("",)

    @property
    def narrow(self) -> InstructionSet:
        """The same instructions on vectors of 16 lanes: for groups that do not fill a wide vector."""
        return self if self.lanes == 16 else NARROW[self.accumulates]


_WIDE = ("AVX512", "AVX10")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
INSTRUCTION_SETS = (  # the best first
    InstructionSet("avx512vnni", 32, True, True, (*_AVX512, "avx512vnni"), _WIDE),
    InstructionSet("avx512", 32, True, False, _AVX512, _WIDE),
    InstructionSet("avxvnni", 16, True, True, ("avx2", "avxvnni"), ("AVX2", *_WIDE)),
    InstructionSet("avx2", 16, True, False, ("avx2",), ("AVX2", *_WIDE)),
    InstructionSet("generic", 16),
)
BY_NAME = {known.name: known for known in INSTRUCTION_SETS}
# AVX-512 with products of bfloat16, added in pairs to float32.
BFLOAT = InstructionSet("avx512bf16", 32, needs=(*_AVX512, "avx512bf16"), capability=_WIDE)
# On a processor with AVX-512 the instruction of AVX-VNNI goes by the name avx512vl.
NARROW = {True: BY_NAME["avxvnni"], False: BY_NAME["avx2"]}


@functools.cache
def instruction_set() -> InstructionSet:
    """The best one that numba compiles for here and that torch uses too: ``ATEN_CPU_CAPABILITY`` lowers it."""
    return next(known for known in INSTRUCTION_SETS if is_there(known))


def is_there(known: InstructionSet) -> bool:
    """Whether numba compiles it for here, and torch uses as much."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    features, capability = target_features() if is_x86 else frozenset(), torch.backends.cpu.get_cpu_capability()
    return features.issuperset(known.needs) and capability.startswith(known.capability)


class _BFloat(ir.types.Type):
    """bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()


def vector(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes)


def constant(value: Any, kind: Any) -> Any:
    """A scalar, or a vector whose lanes are all ``value``."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


class Emit:
    """A few vector operations on top of llvmlite's builder."""

    def __init__(self, builder: Any, isa: InstructionSet) -> None:
        self.b = builder
        self.isa = isa

    def at(self, base: Any, offset: Any) -> Any:
        """An address in bytes: ``base`` is ``i8*`` or int64, ``offset`` an int64 value or a Python int."""
        if base.type == I64:
            base = self.b.inttoptr(base, _BYTES)
        offset = ir.Constant(I64, offset) if isinstance(offset, int) else offset
        return self.b.gep(base, [offset])

    def load(self, base: Any, kind: Any, offset: Any = 0, align: int = 4) -> Any:
        value = self.b.load(self.b.bitcast(self.at(base, offset), kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Any, base: Any, offset: Any = 0, align: int = 4) -> None:
        self.b.store(value, self.b.bitcast(self.at(base, offset), value.type.as_pointer())).align = align

    def prefetch(self, base: Any, offset: Any, near: int = 3) -> None:
        """Ask for a cache line; an address beyond the array does no harm. ``near``: 3 for the nearest cache, then 2."""
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0i8")
        self.b.call(function, [self.at(base, offset), *(ir.Constant(I32, hint) for hint in (0, near, 1))])

    def times(self, index: Any, factor: int) -> Any:
        return self.b.mul(index, ir.Constant(I64, factor))

    def plus(self, index: Any, addend: int) -> Any:
        return self.b.add(index, ir.Constant(I64, addend))

    def shuffle(self, a: Any, b: Any, order: list[int]) -> Any:
        return self.b.shuffle_vector(a, b, ir.Constant(vector(I32, len(order)), order))

    def widen(self, quantity: Any, lanes: int) -> Any:
        """A scalar, or a short vector, spread evenly over ``lanes``."""
        if not isinstance(quantity.type, ir.VectorType):
            kind = vector(quantity.type, lanes)
            quantity = self.b.insert_element(ir.Constant(kind, ir.Undefined), quantity, ir.Constant(I32, 0))
            return self.shuffle(quantity, quantity, [0] * lanes)
        each = lanes // quantity.type.count
        return self.shuffle(quantity, quantity, [lane // each for lane in range(lanes)])

    def shift_right(self, words: Any, bits: int) -> Any:
        return self.b.lshr(words, constant(bits, words.type)) if bits else words

    def mask(self, words: Any, bits: int) -> Any:
        return self.b.and_(words, constant(bits, words.type))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)

    def multiply_add_halves(self, a: Any, b: Any, total: Any) -> Any:
        """``total``, 16 float32, plus the products of 32 bfloat16 (as 16 int32), neighbours added: AVX512-BF16."""
        kind = vector(BF16, 32)
        a, b = self.b.bitcast(a, kind), self.b.bitcast(b, kind)
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, a, b)

    def multiply_add(self, a: Any, b: Any, total: Any | None) -> Any:
        """``total`` plus the products of int16, neighbours added: half as many int32."""
        lanes = a.type.count
        wide = vector(I32, lanes // 2)
        bits = 16 * lanes
        if total is not None and self.isa.accumulates:
            a, b = self.b.bitcast(a, wide), self.b.bitcast(b, wide)
            return self.call(f"llvm.x86.avx512.vpdpwssd.{bits}", wide, total, a, b)
        if self.isa.multiplies:
            name = "llvm.x86.avx2.pmadd.wd" if lanes == 16 else "llvm.x86.avx512.pmaddw.d.512"
            products = self.call(name, wide, a, b)
        else:
            each = vector(I32, lanes)
            product = self.b.mul(self.b.sext(a, each), self.b.sext(b, each))
            even, odd = list(range(0, lanes, 2)), list(range(1, lanes, 2))
            products = self.b.add(self.shuffle(product, product, even), self.shuffle(product, product, odd))
        return products if total is None else self.b.add(total, products)

    def halves_added(self, quantity: Any) -> Any:
        lanes = list(range(quantity.type.count))
        middle = len(lanes) // 2
        low, high = self.shuffle(quantity, quantity, lanes[:middle]), self.shuffle(quantity, quantity, lanes[middle:])
        return self.b.fadd(low, high)

    def sums_of_four(self, vectors: list[Any]) -> Any:
        """The sums of four vectors of floats, in the four lanes of one."""
        while vectors[0].type.count > 8:
            vectors = [self.halves_added(each) for each in vectors]
        even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
        for _ in range(2):
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.b.fadd(self.shuffle(a, b, even), self.shuffle(a, b, odd)) for a, b in pairs]
        return self.halves_added(vectors[0])

    def loop(self, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """``for i in range(count): carried = body(i, carried)`` with vectors kept in registers."""
        b = self.b
        before = b.block
        inside, done = b.append_basic_block("loop"), b.append_basic_block("done")
        zero = ir.Constant(I64, 0)
        b.cbranch(b.icmp_signed("<", zero, count), inside, done)
        b.position_at_end(inside)
        i = b.phi(I64)
        i.add_incoming(zero, before)
        state = [b.phi(value.type) for value in carried]
        following = body(i, list(state))
        after = self.plus(i, 1)
        i.add_incoming(after, b.block)
        for phi, start, value in zip(state, carried, following, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, b.block)
        last = b.block
        b.cbranch(b.icmp_signed("<", after, count), inside, done)
        b.position_at_end(done)
        results = []
        for start, value in zip(carried, following, strict=True):
            result = b.phi(value.type)
            result.add_incoming(start, before)
            result.add_incoming(value, last)
            results.append(result)
        return results

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)
