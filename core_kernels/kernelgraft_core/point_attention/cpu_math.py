"""Powers of two and GELU on vectors of float32, in LLVM instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from kernelgraft_core.runtime.cpu_vectors import I32, Emit, constant, vector

# Minimax polynomials, lowest power first. 2^t for |t| <= 1/2: relative error 8e-8.
POWER = (1.0000001192092896, 0.693146944046, 0.2402212023735, 0.0555071346462, 0.0096755418926, 0.0013276470127)
# log2 of the normal distribution below -t, for 0 <= t <= 8. Weighted by the distribution: GELU is within 1e-7 |x|.
TAIL = (
    -0.9999999403953552, -1.1511080265045166, -0.4591834247112274, -0.05257771164178848, 0.007187775336205959,
    -0.00023199367569759488, -0.00015098134463187307, 3.4805085306288674e-05, -3.295297801741981e-06,
    1.1950479006372916e-07,
)  # fmt: skip
TAIL_END = 8.0
LOWEST = -126.0


def power_of_two(emit: Emit, x: Any) -> Any:
    """``2 ** x`` for x at most 127; what is below -126 counts as -126, and NaN stays NaN."""
    b, kind = emit.b, x.type
    x = _at_least(emit, x, LOWEST)
    whole = emit.call(f"llvm.rint.v{kind.count}f32", kind, x)
    total = _polynomial(emit, b.fsub(x, whole), POWER)
    integers = vector(I32, kind.count)
    exponent = b.shl(b.add(b.fptosi(whole, integers), constant(127, integers)), constant(23, integers))
    return b.fmul(total, b.bitcast(exponent, kind))


def gelu(emit: Emit, x: Any) -> Any:
    """``x`` times the normal distribution up to ``x``; NaN stays NaN."""
    b, kind = emit.b, x.type
    size = emit.call(f"llvm.fabs.v{kind.count}f32", kind, x)
    end = constant(TAIL_END, kind)
    size = b.select(b.fcmp_ordered(">", size, end), end, size)
    beyond = b.fmul(x, power_of_two(emit, _polynomial(emit, size, TAIL)))
    return b.select(b.fcmp_ordered("<", x, constant(0.0, kind)), beyond, b.fsub(x, beyond))


def larger(emit: Emit, a: Any, b: Any) -> Any:
    """Of ``a``, and of ``b`` where it is a number."""
    return emit.b.select(emit.b.fcmp_ordered(">", b, a), b, a)


def _polynomial(emit: Emit, x: Any, factors: Sequence[float]) -> Any:
    total = constant(factors[-1], x.type)
    for factor in factors[-2::-1]:
        total = emit.fma(total, x, constant(factor, x.type))
    return total


def _at_least(emit: Emit, x: Any, low: float) -> Any:
    limit = ir.Constant(x.type, [low] * x.type.count)
    return emit.b.select(emit.b.fcmp_ordered("<", x, limit), limit, x)
