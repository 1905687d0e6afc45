"""Arguments for every op of the family, for reports, measurements and tests that go over all ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .weight import W4A16Weight

TUNED = ("w4a16_linear",)
"""Ops that measure themselves inside ``PLANS.tuning()``; the first dimension of their first argument is tokens."""


def example_args(
    device: torch.device | str,
    *,
    m: int = 3,
    n: int = 96,
    k: int = 256,
    group: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call.

    Args:
        m, n, k: tokens, output and input features; group: columns that share a scale.
        dtype: of the activations.

    Raises:
        ValueError: the group size does not divide ``k``.
    """
    if group < 1 or k % group:
        raise ValueError(f"group size {group} does not divide K = {k}")
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 16, (n, k), generator=generator)
    zeros = torch.randint(0, 16, (n, k // group), generator=generator)
    scales = torch.rand(n, k // group, generator=generator) * 0.02 + 0.01
    packed = W4A16Weight.from_integers(integers, scales, zeros)
    weight = W4A16Weight(*(t.to(device) for t in (packed.qweight, packed.scales, packed.zeros))).arranged()
    x, grad, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((m, k), (m, n), (n,)))
    tensors = (weight.qweight, weight.scales, weight.zeros)
    return {
        "w4a16_linear": (x, *tensors, bias),
        "w4a16_linear_dgrad": (grad, *tensors),
        "dequantize_w4a16": (*tensors, dtype),
    }


def peer(op: str, args: tuple[Any, ...]) -> tuple[str, Callable[..., Tensor], tuple[Tensor, ...]] | None:
    """What people run who have the weight in 16 bits: a name, the function and its operands; None where nothing is."""
    if op == "dequantize_w4a16":
        return None
    x, qweight, scales, zeros, *bias = args
    dense = reference.dequantize_w4a16(qweight, scales, zeros, x.dtype)
    kind = str(x.dtype).removeprefix("torch.")
    if op == "w4a16_linear":
        return f"F.linear {kind}", F.linear, (x, dense, *bias)
    return f"torch.matmul {kind}", torch.matmul, (x, dense)
