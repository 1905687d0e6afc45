"""Arguments for the linear op of the family, for reports, measurements and tests that go over all ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight import W4A8Weight

TUNED = ("w4a8_linear",)
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
        m, n, k: tokens, output and input features; group: columns that share a zero point.
        dtype: of the activations.

    Raises:
        ValueError: the group size does not divide ``k``, or is odd.
    """
    if group < 1 or k % group or group % 2:
        raise ValueError(f"group size {group} is odd or does not divide K = {k}")
    generator = torch.Generator().manual_seed(0)
    step = torch.randint(1, 9, (n, k // group), generator=generator)
    zero = step * torch.randint(0, 15, step.shape, generator=generator)
    q = torch.randint(0, 16, (n, k), generator=generator)
    scale = torch.rand(n, generator=generator) * 1e-3 + 1e-3
    weight = W4A8Weight.from_integers(q, scale, group_scale=step, group_zero=zero).to(device).arranged()
    x, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((m, k), (n,)))
    return {"w4a8_linear": (x, *weight.tensors, bias)}


def peer(op: str, args: tuple[Any, ...]) -> tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]:
    """What people run who have the weight in 16 bits: a name, the function and its operands."""
    x, *tensors, bias = args
    dense = W4A8Weight(*tensors).values(torch.float32).to(x.dtype)
    return f"F.linear {str(x.dtype).removeprefix('torch.')}", F.linear, (x, dense, bias)
