"""W4A8 and W8A8 beside what people run today; importing this registers the cases."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelgraft_core.quant.w4a8 import W4A8Weight, w4a8_linear
from kernelgraft_core.quant.w8a8 import w8a8_linear
from kernelgraft_core.runtime.timing import rotated

from .cases import GROUP, TOKENS, Case, Prepared, Shape, Variant, linear_flops, register, require_backend

EIGHT_BITS = 0.02  # of error that rounding activations to 8 bits brings


def _weight(shape: Shape, group: int) -> W4A8Weight:
    n, k = shape["n"], shape["k"]
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (n, k), generator=generator)
    scale = torch.rand(n, generator=generator) * 1e-3 + 1e-3
    if group == -1:
        return W4A8Weight.from_integers(q, scale, zero=torch.randint(6, 10, (n,), generator=generator))
    step = torch.randint(4, 9, (n, k // group), generator=generator)
    zero = step * torch.randint(6, 10, step.shape, generator=generator)
    return W4A8Weight.from_integers(q, scale, group_scale=step, group_zero=zero)


def _warm(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run`` after every copy that it rotates over was used: some weights are expanded at their first use."""
    for _ in range(32):
        run()
    return run


def _prepare(group: int, shape: Shape) -> Prepared:
    weight = _weight(shape, group)
    held, exact = weight.arranged(), weight.values(torch.float64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape["m"], shape["k"], generator=generator).bfloat16()
    require_backend("w4a8_linear", "cpu", "cpu", x, *weight.tensors, None)
    int8, rounded = weight.int8(), exact.bfloat16()
    packed = sum(t.nbytes for t in weight.tensors if t is not None)
    # Activations in 8 bits before the clock starts, with one scale for all of them.
    step = float(x.float().abs().amax() / 127)
    unsigned = (x.float() / step + 128).round().to(torch.uint8)
    scales, zeros = weight.scale.float(), torch.zeros(len(int8), dtype=torch.int32)

    def static(packed: Tensor) -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned, step, 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        return product

    # Its layout is no ordinary tensor's: it cannot be cloned.
    copies = [torch.ops.onednn.qlinear_prepack(int8.clone(), None) for _ in range(1 + (64 << 20) // int8.nbytes)]
    turns = itertools.cycle(copies)
    variants = {
        "kernelgraft": Variant(
            rotated(lambda *t: w4a8_linear(x, *t), *held.tensors), EIGHT_BITS, "cpu", "bfloat16", packed
        ),
        "kernelgraft, int8 resident": Variant(
            _warm(rotated(lambda *t: w4a8_linear(x, *t), *weight.tensors)),
            EIGHT_BITS,
            "cpu",
            "bfloat16",
            packed + int8.nbytes,
        ),
        "kernelgraft w8a8": Variant(
            _warm(rotated(lambda w, s: w8a8_linear(x, w, s), int8, weight.scale)),
            EIGHT_BITS,
            "cpu",
            "bfloat16",
            2 * int8.nbytes,
        ),
        "F.linear bf16": Variant(rotated(lambda w: F.linear(x, w), rounded), 0.01, "torch", "bfloat16", rounded.nbytes),
        "oneDNN u8s8, static": Variant(lambda: static(next(turns)), EIGHT_BITS, "torch", "uint8", int8.nbytes),
    }
    return Prepared(x.double() @ exact.T, variants)


def _bytes(group: int, shape: Shape) -> float:
    m, n, k = shape["m"], shape["n"], shape["k"]
    return n * k / 2 + 2 * n + (n if group == -1 else 2 * n * k / group) + 2 * m * (n + k)


_SHAPES = (
    *({"m": m, "n": 4096, "k": 4096} for m in TOKENS),
    *({"m": m, "n": 11008, "k": 4096} for m in (1, 8, 64)),
)
for _name, _group in (("w4a8", GROUP), ("w4a8_channel", -1)):
    register(
        Case(
            _name,
            "w4a8_linear",
            "cpu",
            "F.linear bf16",
            _SHAPES,
            functools.partial(_prepare, _group),
            linear_flops,
            functools.partial(_bytes, _group),
            rotates=True,
        )
    )
